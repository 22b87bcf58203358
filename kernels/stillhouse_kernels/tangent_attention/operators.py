"""The fast paths as torch operators, opaque to torch.compile, with the gradients of the primal.

Each takes the name of the path that runs, `streaming` or `triton`, which is imported when it is
first needed. The tangent comes out attached to a node that raises.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stillhouse_kernels.attention_inputs import autocast_off
from stillhouse_kernels.primal_gradients import register_gradients
from stillhouse_kernels.tangent_attention import streaming


def path(backend: str) -> ModuleType:
    """Return the module that implements `streaming` or `triton`."""
    if backend == "triton":
        from stillhouse_kernels.tangent_attention import launch

        return launch
    return streaming


@torch.library.custom_op("stillhouse_kernels::tangent_attention_forward", mutates_args=())
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return O [B, h, N, e] and lse [B, h, N].

    Args:
        q: [B, h, N, d].
        k: [B, g, M, d].
        v: [B, g, M, e].
        mask: None or boolean [B or 1, h or 1, N, M], True = attend.
        causal: query i sees the keys j <= i + M - N.
        scale: of the scores.
        backend: `streaming` or `triton`.
    """
    with autocast_off(q):
        return path(backend).forward(q, k, v, mask, causal, scale)


@forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _empty_out(q, v), _empty_lse(q)


@torch.library.custom_op("stillhouse_kernels::tangent_attention_jvp", mutates_args=())
def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O, its tangent and lse; arguments as in `forward`, tangents as their primals."""
    with autocast_off(q):
        return path(backend).jvp(q, k, v, q_t, k_t, v_t, mask, causal, scale)


@jvp.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_out(q, v), _empty_out(q, v), _empty_lse(q)


@torch.library.custom_op("stillhouse_kernels::tangent_attention_backward", mutates_args=())
def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV of the primal, for grad_out [B, h, N, e]."""
    with autocast_off(q):
        return path(backend).backward(q, k, v, out, lse, grad_out, mask, causal, scale)


@backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _empty_lse(q: Tensor) -> Tensor:
    working = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape[:3], dtype=working)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *_, mask, causal, scale, backend = inputs
    out, lse = output[0], output[-1]
    ctx.save_for_backward(q, k, v, mask, out, lse)
    ctx.settings = (causal, scale, backend)
    ctx.mark_non_differentiable(lse)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, mask, out, lse = ctx.saved_tensors
    return backward(q, k, v, out, lse, grad_out, mask, *ctx.settings)


register_gradients(
    "attention", forward, jvp, backward, save=_save, gradients=_gradients, settings=4
)
