"""A student's and a teacher's vocabulary head, for the tests of the loss between them."""

from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from stillhouse_kernels.vocabulary_loss import TeacherTopK, linear_divergence
from stillhouse_kernels.vocabulary_loss.settings import Divergence

DIVERGENCES = get_args(Divergence)


@dataclass
class Problem:
    """Two heads: X [n, H], W [V, H], b [V]; Y [n, Ht], U [V, Ht], c [V]."""

    X: Tensor
    W: Tensor
    b: Tensor
    Y: Tensor
    U: Tensor
    c: Tensor

    def __call__(self, *, loss_scale: float = 1.0, **options: Any) -> list[Tensor]:
        """Return the loss, dX, dW and db."""
        X, W, b = (x.detach().requires_grad_() for x in (self.X, self.W, self.b))
        dense = options.get("teacher_topk") is None
        Y, U, c = (self.Y, self.U, self.c) if dense else (None, None, None)
        loss = linear_divergence(X, W, Y, U, student_bias=b, teacher_bias=c, **options)
        gradients = torch.autograd.grad(loss * loss_scale, (X, W, b))
        assert not any(x.requires_grad for x in gradients)
        return [loss.detach(), *gradients]

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(x.to(dtype) for x in vars(self).values()))


def problem(n: int = 13, V: int = 63, H: int = 8, Ht: int = 6, *, seed: int = 0) -> Problem:
    g = torch.Generator().manual_seed(seed)
    shapes = [(n, H), (V, H), (V,), (n, Ht), (V, Ht), (V,)]
    return Problem(*(torch.randn(s, generator=g, dtype=torch.float64) for s in shapes))


def top_k(p: Problem, k: int, drawn: int = 0) -> TeacherTopK:
    log_p = (p.Y @ p.U.t() + p.c).log_softmax(-1)
    log_probs, order = log_p.sort(-1, descending=True)
    ids, rest = order[:, :k], log_probs[:, k:]
    residual = rest.logsumexp(-1) if rest.shape[1] else torch.full((len(ids),), -torch.inf)
    if not drawn:
        return TeacherTopK(ids, log_probs[:, :k], residual.double())
    tail = rest.log_softmax(-1)
    columns = torch.multinomial(tail.exp(), drawn, True, generator=torch.Generator().manual_seed(1))
    entropy = -(tail.exp() * tail).sum(-1)
    return TeacherTopK(ids, log_probs[:, :k], residual, order[:, k:].gather(1, columns), entropy)


def some(n: int) -> Tensor:
    return torch.arange(n) % 3 != 1


def assert_same(got: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> None:
    for name, a, b in zip(("loss", "dX", "dW", "db"), got, expected, strict=True):
        a, b = a.double(), b.double()
        error = (a - b).norm() / b.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


def loss_of(p: Problem, requires: str = "XW", **options: Any) -> Tensor:
    tensors = {name: x.detach().requires_grad_(name in requires) for name, x in vars(p).items()}
    X, W, Y, U = (tensors[name] for name in "XWYU")
    return linear_divergence(X, W, Y, U, **options)
