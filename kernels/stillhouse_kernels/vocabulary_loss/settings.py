"""What the implementations of the loss are told: records, without a tensor in the first two."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Divergence = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]


@dataclass(frozen=True)
class Shaping:
    """From products to logits: softcap(scale · x), softcap(x) = c tanh(x / c).

    Attributes:
        scale: factor on h Wᵀ + b.
        softcap: c, or None.
    """

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Settings:
    """Which divergence, between which logits.

    Attributes:
        divergence: a name; `canonical` has resolved the special cases.
        weight: β of `jsd`, α of the skewed ones; the others ignore it.
        temperature: τ of both softmaxes.
        factor: on the loss: τ^2, or 1.
        student, teacher: shaping of each model's logits.
    """

    divergence: str
    weight: float
    temperature: float
    factor: float
    student: Shaping
    teacher: Shaping


class TeacherTopK(NamedTuple):
    """The teacher's k likeliest tokens, the mass of the others, and draws from them.

    Attributes:
        ids: int64 [tokens, k].
        log_probs: [tokens, k], untempered.
        log_residual: [tokens], log of the mass outside of `ids`; -inf where nothing is left.
        tail_ids: int64 [tokens, s], drawn from the teacher's distribution outside of `ids`.
        tail_entropy: [tokens], entropy of that distribution, nats; given with `tail_ids`.
    """

    ids: Tensor
    log_probs: Tensor
    log_residual: Tensor
    tail_ids: Tensor | None = None
    tail_entropy: Tensor | None = None

    def at(self, rows: Tensor | slice) -> "TeacherTopK":
        """Return the record of some tokens, without their history."""
        ids, log_probs, log_residual, *drawn = (
            None if x is None else x.detach()[rows] for x in self
        )
        assert ids is not None
        assert log_probs is not None
        assert log_residual is not None
        return TeacherTopK(ids, log_probs, log_residual, *drawn)


def canonical(divergence: str, beta: float, alpha: float) -> tuple[str, float]:
    """Return the name and the weight with the special cases of β and α resolved.

    JSD at β = 0 and 1 is forward and reverse KL by GKD's convention, a skewed KL at α = 0 is the
    KL by its formula.
    """
    if divergence == "jsd":
        edge = {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")
        return edge, beta
    if divergence.startswith("skew") and alpha == 0.0:
        return divergence.removeprefix("skew_"), alpha
    return divergence, alpha


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of everything between the products and G: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
