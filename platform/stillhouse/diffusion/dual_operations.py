"""Forward-mode derivatives where torch has none, in any network and without a change to it.

torch's fused attention has no forward-mode derivative, and that of its group norm fails where the
tangent lies otherwise in memory than its primal. Networks call both by torch's public names, and so
do the attention processors of diffusers: inside `dual_operations()` these names compute operations
that have one. Outside nothing is changed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import group_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from stillhouse.errors import UserError
from stillhouse_kernels import attention

# diffusers hides a key by adding this to its score, transformers by the lowest number there is.
HIDDEN = -10_000.0


class _DualOperations(TorchFunctionMode):
    """Sends a call to the operation that takes its place."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _INSTEAD.get(func, func)(*args, **(kwargs or {}))


@contextmanager
def dual_operations() -> Iterator[None]:
    """Compute by operations that have a forward-mode derivative, inside a `with`."""
    with _DualOperations():
        yield


def dual_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return what scaled_dot_product_attention returns, and its tangent under forward-mode AD.

    A mask that is added to the scores becomes a boolean one where all that it does is to hide keys.
    What `stillhouse_kernels.attention` does not take goes to torch's math backend: another added
    mask, shapes that are not [batch, heads, tokens, head_dim], causality without equal lengths.

    Args:
        query: [B, h, N, d].
        key: [B, h_kv, M, d].
        value: [B, h_kv, M, e].
        attn_mask: boolean, True = attend, or added to the scores.
        dropout_p: 0.
        is_causal: query i sees the keys j <= i.
        scale: of the scores; d^-1/2 by default.
        enable_gqa: whether h may be a multiple of h_kv.

    Raises:
        UserError: for dropout, which would differ from pass to pass.
    """
    if dropout_p:
        raise UserError(
            f"the network drops attention weights (dropout_p={dropout_p}), other ones in every "
            "pass of a tangent; set its attention dropout to 0"
        )
    mask = attn_mask
    if mask is not None and mask.dtype != torch.bool:
        mask = (mask > HIDDEN) if bool(((mask == 0) | (mask <= HIDDEN)).all()) else None
    taken = (
        query.ndim == 4
        and (attn_mask is None) == (mask is None)
        and (not is_causal or query.shape[-2] == key.shape[-2])
    )
    if taken:
        return attention(query, key, value, mask=mask, causal=is_causal, scale=scale)
    with sdpa_kernel(SDPBackend.MATH):
        settings = (attn_mask, dropout_p, is_causal)
        return scaled_dot_product_attention(
            query, key, value, *settings, scale=scale, enable_gqa=enable_gqa
        )


def dual_group_norm(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return torch's group norm of a copy whose tangent lies in memory as its primal does."""
    return group_norm(input.clone(memory_format=torch.contiguous_format), *args, **kwargs)


_INSTEAD: dict[Callable[..., Any], Callable[..., Any]] = {
    scaled_dot_product_attention: dual_attention,
    group_norm: dual_group_norm,
}
