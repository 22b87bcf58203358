"""Inputs of attention with tangents, and the truth: torch's own jvp of its definition."""

from collections.abc import Sequence
from typing import Any

import torch
from attention_cases import normal
from torch import Tensor

# Relative in norm to float64: values, tangents, gradients.
TOLERANCES = {
    torch.float64: (1e-13, 1e-13, 1e-13),
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 1e-3, 1e-3),
    torch.bfloat16: (1e-2, 1e-2, 1e-2),
}


def explicit(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, causal: bool = False,
    scale: float | None = None,
) -> Tensor:  # fmt: skip
    """Attention written out, without a line of the package."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    S = (q.shape[3] ** -0.5 if scale is None else scale) * q @ k.mT
    seen = torch.ones(S.shape, dtype=torch.bool)
    if causal:
        seen = seen.tril(S.shape[3] - S.shape[2])
    if mask is not None:
        seen = seen & mask
    return torch.where(seen, torch.where(seen, S, torch.finfo(S.dtype).min).softmax(-1), 0) @ v


def tensors(
    heads: int = 2, kv_heads: int | None = None, queries: int = 9, keys: int | None = None,
    width: int = 8, value_width: int | None = None, **changes: Any,
) -> list[Tensor]:  # fmt: skip
    """q, k, v and their tangents; `batch`, `dtype`, `offset` of all keys and their tangents."""
    batch, dtype = changes.get("batch", 1), changes.get("dtype", torch.float64)
    kv_heads, keys = kv_heads or heads, keys or queries
    shapes = [
        (batch, heads, queries, width),
        (batch, kv_heads, keys, width),
        (batch, kv_heads, keys, value_width or width),
    ]
    made = [changes.get("size", 1.0) * normal(*shapes[i % 3], seed=i) for i in range(6)]
    for i in (1, 4):
        made[i] = made[i] + changes.get("offset", 0.0)
    return [t.to(dtype) for t in made]


def truth(six: Sequence[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The output and its tangent, in float64, of the numbers that the inputs hold."""
    six = [t.detach().double() for t in six]
    return torch.func.jvp(lambda *qkv: explicit(*qkv, **options), tuple(six[:3]), tuple(six[3:]))


def true_gradients(three: Sequence[Tensor], grad_out: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in three]
    return list(torch.autograd.grad(explicit(*leaves, **options), leaves, grad_out.double()))
