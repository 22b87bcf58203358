"""Inputs of ReLU linear attention with tangents, and the truth: torch's own jvp of its formula."""

from collections.abc import Sequence
from typing import Any

import torch
from attention_cases import normal
from torch import Tensor

BACKENDS = ["reference", "streaming"]
# h, h_kv, N, M, d, e
SHAPES = {
    "square": (3, 3, 40, 40, 8, 8),
    "grouped, of other lengths and widths": (6, 2, 50, 23, 12, 20),
    "few queries": (2, 1, 1, 60, 16, 4),
}
Six = Sequence[Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-15) -> Tensor:
    """The formula, without a line of the package."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    weights = q.relu() @ k.relu().mT
    return (weights @ v) / (weights.sum(-1, keepdim=True) + eps)


def draw(
    shape: tuple[int, ...] = SHAPES["grouped, of other lengths and widths"],
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
) -> list[Tensor]:
    """q, k, v and their tangents."""
    h, g, queries, keys, d, e = shape
    shapes = [(batch, h, queries, d), (batch, g, keys, d), (batch, g, keys, e)]
    return [normal(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes + shapes)]


def truth(six: Six) -> tuple[Tensor, Tensor]:
    # torch takes no expanded tensors here.
    wide = [t.detach().double().contiguous() for t in six]
    return torch.func.jvp(plain, tuple(wide[:3]), tuple(wide[3:]))


def true_gradients(three: Six, grad_out: Tensor) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in three]
    return list(torch.autograd.grad(plain(*leaves), leaves, grad_out.double()))


def leaves_and_tangents(**changes: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    six = draw(**changes)
    return tuple(t.requires_grad_() for t in six[:3]), tuple(six[3:])
