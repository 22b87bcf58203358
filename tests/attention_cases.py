"""Inputs of shared attention, groups of a leader and followers, and what they must equal."""

from typing import Any

import torch
from torch import Tensor

from stillhouse_kernels.shared_attention import follower_attention, leader_attention

FAST = ["streaming", "triton"]
# Relative in norm to float64: values, gradients.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (2e-6, 2e-5),
    torch.float16: (1e-3, 1e-3),
    torch.bfloat16: (1e-2, 1e-2),
}


def exact(backend: str) -> torch.dtype:
    """The widest type that the backend takes."""
    return torch.float32 if backend == "triton" else torch.float64


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).norm() / wanted.norm())


def normal(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def inputs(
    heads: tuple[int, ...], queries: int, keys: int, width: int = 16, **changes: Any
) -> list[Tensor]:
    """q, k and one v for each further head count; heads = (h, h_kv, h_1, ...)."""
    batch, dtype = changes.get("batch", 1), changes.get("dtype", torch.float64)
    rows = [queries] + [keys] * (len(heads) - 1)
    sizes = [(batch, h, n, width) for h, n in zip(heads, rows, strict=True)]
    return [normal(*size, dtype=dtype, seed=i).requires_grad_() for i, size in enumerate(sizes)]


def group(backend: str, q: Tensor, k: Tensor, *values: Tensor, **options: Any) -> list[Tensor]:
    """The outputs of a leader and its followers."""
    out, state = leader_attention(q, k, values[0], backend=backend, **options)
    return [out, *(follower_attention(state, v) for v in values[1:])]


def weighted_sum(outs: list[Tensor]) -> Tensor:
    weights = [normal(*out.shape, dtype=out.dtype, seed=90 + i) for i, out in enumerate(outs)]
    return torch.stack(
        [(w * out).sum().float() for w, out in zip(weights, outs, strict=True)]
    ).sum()


def gradients(outs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    weights = [normal(*out.shape, dtype=out.dtype, seed=90 + i) for i, out in enumerate(outs)]
    return list(torch.autograd.grad(outs, leaves, weights))


def assert_group_agrees(backend: str, leaves: list[Tensor], **options: Any) -> None:
    """Values and gradients of a backend against the float64 reference."""
    for_values, for_gradients = TOLERANCES[leaves[0].dtype]
    truth = [leaf.detach().double().clone().requires_grad_() for leaf in leaves]
    wanted = group("reference", *truth, **options)
    found = group(backend, *leaves, **options)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == leaves[0].dtype
        assert relative(a, b) < for_values
    wanted_gradients = torch.autograd.grad(
        wanted,
        truth,
        [
            normal(*o.shape, dtype=leaves[0].dtype, seed=90 + i).double()
            for i, o in enumerate(wanted)
        ],
    )
    for a, b in zip(gradients(found, leaves), wanted_gradients, strict=True):
        assert relative(a, b) < for_gradients
