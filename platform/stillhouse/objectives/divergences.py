"""Divergences between next-token distributions: the one place that fixes their conventions.

P is the teacher's distribution, Q the student's; the argument order everywhere is
(student, teacher). β and α follow GKD and DistiLLM:

| name               | D(P, Q)                                              | source           |
|--------------------|------------------------------------------------------|------------------|
| `forward_kl`       | KL(P, Q)                                             | Hinton 1503.02531|
| `reverse_kl`       | KL(Q, P)                                             | MiniLLM 2306.08543|
| `jsd`              | β KL(P, M) + (1-β) KL(Q, M),  M = β P + (1-β) Q      | GKD 2306.13649   |
| `skew_forward_kl`  | KL(P, α P + (1-α) Q)                                 | DistiLLM 2402.03898|
| `skew_reverse_kl`  | KL(Q, (1-α) P + α Q)                                 | DistiLLM 2402.03898|
| `total_variation`  | ½ Σ abs(P - Q)                                       |                  |

In `jsd`, β multiplies the teacher's term and is P's weight in M. β = 0 and β = 1 are special-cased
to forward and reverse KL as in GKD's code: the formula itself vanishes there, with
lim JSD_β/β = KL(P, Q) and lim JSD_β/(1-β) = KL(Q, P), so the loss jumps in scale between β = 0 and
β = 0.01. DistiLLM's own JSD weighs the other way round (its λ is 1-β).

All work on log-probabilities [..., V] and return [...], nats. A symbol that is impossible under the
distribution that the expectation is taken over (log-probability -inf) contributes 0 log 0 = 0. One
that is impossible only under the other makes a KL infinite, as it should be.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError

LogProbs = Float[Tensor, "*N V"]
DivergenceName = Literal[
    "forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation"
]
Divergence = Callable[[LogProbs, LogProbs], Float[Tensor, "*N"]]


def _expectation_of_log_ratio(log_a: LogProbs, log_b: LogProbs) -> Float[Tensor, "*N"]:
    """KL(A, B) = Σ A (log A - log B), with 0 log 0 = 0 and no NaN in the gradient."""
    impossible = log_a == -torch.inf
    ratio = log_a - log_b
    if impossible.any():  # seldom: only then is another pass over the vocabulary worth its time
        ratio = ratio.masked_fill(impossible, 0.0)
    return (log_a.exp() * ratio).sum(-1)


def _log_mixture(log_a: LogProbs, log_b: LogProbs, weight_of_a: float) -> LogProbs:
    """log(w A + (1-w) B), exact at w = 0 and w = 1."""
    if weight_of_a == 0.0:
        return log_b
    if weight_of_a == 1.0:
        return log_a
    w = torch.tensor(weight_of_a, dtype=log_a.dtype, device=log_a.device)
    both_impossible = (log_a == -torch.inf) & (log_b == -torch.inf)
    mixture = torch.logaddexp(
        log_a.masked_fill(both_impossible, 0) + w.log(),
        log_b.masked_fill(both_impossible, 0) + (1 - w).log(),
    )
    return mixture.masked_fill(both_impossible, -torch.inf)


def forward_kl(student: LogProbs, teacher: LogProbs) -> Float[Tensor, "*N"]:
    """KL(P, Q); gradient in the student's logits Q - P."""
    return _expectation_of_log_ratio(teacher, student)


def reverse_kl(student: LogProbs, teacher: LogProbs) -> Float[Tensor, "*N"]:
    """KL(Q, P); gradient in the student's logits Q (log Q/P - KL(Q, P))."""
    return _expectation_of_log_ratio(student, teacher)


def jsd(student: LogProbs, teacher: LogProbs, *, beta: float) -> Float[Tensor, "*N"]:
    """Generalised Jensen-Shannon divergence, at most the binary entropy H(β)."""
    if beta == 0.0:
        return forward_kl(student, teacher)
    if beta == 1.0:
        return reverse_kl(student, teacher)
    mixture = _log_mixture(teacher, student, beta)
    to_teacher = _expectation_of_log_ratio(teacher, mixture)
    to_student = _expectation_of_log_ratio(student, mixture)
    return beta * to_teacher + (1 - beta) * to_student


def skew_forward_kl(student: LogProbs, teacher: LogProbs, *, alpha: float) -> Float[Tensor, "*N"]:
    """KL(P, α P + (1-α) Q), at most -log α; α = 0 is forward KL."""
    return _expectation_of_log_ratio(teacher, _log_mixture(teacher, student, alpha))


def skew_reverse_kl(student: LogProbs, teacher: LogProbs, *, alpha: float) -> Float[Tensor, "*N"]:
    """KL(Q, (1-α) P + α Q), at most -log α; α = 0 is reverse KL."""
    return _expectation_of_log_ratio(student, _log_mixture(student, teacher, alpha))


def total_variation(student: LogProbs, teacher: LogProbs) -> Float[Tensor, "*N"]:
    """½ Σ abs(P - Q), in [0, 1]; the gradient at ties is 0."""
    return 0.5 * (student.exp() - teacher.exp()).abs().sum(-1)


@dataclass(frozen=True)
class NamedDivergence:
    """A divergence of the table, which a kernel finds by its name.

    Attributes:
        name: the table's.
        function: of (student, teacher) log-probabilities.
        weights: the keywords that `function` is bound to: `beta` of `jsd`, `alpha` of the skewed.
    """

    name: str
    function: Callable[..., Float[Tensor, "*N"]]
    weights: Mapping[str, float] = field(default_factory=dict)

    def __call__(self, student: LogProbs, teacher: LogProbs) -> Float[Tensor, "*N"]:
        """Return D(P, Q) of log-probabilities, nats."""
        return self.function(student, teacher, **self.weights)


def named_divergence(name: str, *, beta: float, alpha: float) -> NamedDivergence:
    """Return the divergence of that name as a function of (student, teacher) log-probabilities.

    Args:
        name: a name of the table above.
        beta: weight of the teacher in `jsd`, in [0, 1]; the others ignore it.
        alpha: skew, in [0, 1); only the skewed ones read it.

    Raises:
        UserError: for another name, or a weight outside its range.
    """
    table = {
        "forward_kl": NamedDivergence("forward_kl", forward_kl),
        "reverse_kl": NamedDivergence("reverse_kl", reverse_kl),
        "jsd": NamedDivergence("jsd", jsd, {"beta": beta}),
        "skew_forward_kl": NamedDivergence("skew_forward_kl", skew_forward_kl, {"alpha": alpha}),
        "skew_reverse_kl": NamedDivergence("skew_reverse_kl", skew_reverse_kl, {"alpha": alpha}),
        "total_variation": NamedDivergence("total_variation", total_variation),
    }
    if name not in table:
        raise UserError(f"method.divergence={name}: expected one of {', '.join(table)}")
    if name == "jsd" and not 0 <= beta <= 1:
        raise UserError(f"method.beta={beta}: expected the teacher's weight, in [0, 1]")
    if name.startswith("skew") and not 0 <= alpha < 1:
        raise UserError(f"method.alpha={alpha}: expected a skew in [0, 1)")
    return table[name]
