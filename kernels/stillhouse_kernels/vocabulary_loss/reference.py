"""The loss in plain differentiable torch: the specification of the other implementations.

Every logit is held. Q is the student's distribution, P the teacher's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse_kernels.vocabulary_loss.settings import (
    Settings,
    Shaping,
    TeacherTopK,
    accumulation_dtype,
)


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, shaping: Shaping) -> Tensor:
    """softcap(scale · (h Wᵀ + b)) [n, V], in float32 or float64."""
    dtype = accumulation_dtype(hidden.dtype)
    bias = None if bias is None else bias.to(dtype)
    x = F.linear(hidden.to(dtype), weight.to(dtype), bias) * shaping.scale
    return x if shaping.softcap is None else shaping.softcap * torch.tanh(x / shaping.softcap)


def expectation_of_log_ratio(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(A, B) = Σ A (log A - log B), with 0 log 0 = 0."""
    ratio = (log_a - log_b).masked_fill(log_a == -torch.inf, 0.0)
    return (log_a.exp() * ratio).sum(-1)


def log_mixture(log_a: Tensor, log_b: Tensor, w: float) -> Tensor:
    """log(w A + (1-w) B), 0 < w < 1."""
    neither = (log_a == -torch.inf) & (log_b == -torch.inf)
    a = log_a.masked_fill(neither, 0.0) + math.log(w)
    b = log_b.masked_fill(neither, 0.0) + math.log1p(-w)
    return torch.logaddexp(a, b).masked_fill(neither, -torch.inf)


def divergence(log_q: Tensor, log_p: Tensor, name: str, weight: float) -> Tensor:
    """D(P, Q) of log-probabilities [n, V]: [n], nats. The names are `canonical`."""
    if name == "forward_kl":
        return expectation_of_log_ratio(log_p, log_q)
    if name == "reverse_kl":
        return expectation_of_log_ratio(log_q, log_p)
    if name == "skew_forward_kl":
        return expectation_of_log_ratio(log_p, log_mixture(log_p, log_q, weight))
    if name == "skew_reverse_kl":
        return expectation_of_log_ratio(log_q, log_mixture(log_q, log_p, weight))
    if name == "jsd":
        log_m = log_mixture(log_p, log_q, weight)
        to_teacher = expectation_of_log_ratio(log_p, log_m)
        return weight * to_teacher + (1 - weight) * expectation_of_log_ratio(log_q, log_m)
    assert name == "total_variation"
    return 0.5 * (log_q.exp() - log_p.exp()).abs().sum(-1)


def tempered_divergence(s: Tensor, t: Tensor, settings: Settings) -> Tensor:
    """D(softmax(t/τ), softmax(s/τ)) of logits [n, V]: [n]."""
    log_q = (s / settings.temperature).log_softmax(-1)
    log_p = (t / settings.temperature).log_softmax(-1)
    return divergence(log_q, log_p, settings.divergence, settings.weight)


def top_k_divergence(s: Tensor, teacher: TeacherTopK, settings: Settings) -> Tensor:
    """D over the k tokens and the bucket of all others, plus the tail's term: [n].

    s [n, V] are the student's logits. With draws j from the teacher's tail, the term
    (1-m) (-mean log Q_tail(j) - H(P_tail)) / τ^2 is added.
    """
    kept, log_p = s.gather(-1, teacher.ids), teacher.log_probs.to(s.dtype)
    if teacher.ids.shape[-1] == s.shape[-1]:
        return tempered_divergence(kept, log_p, settings)
    tail = s.scatter(-1, teacher.ids, torch.finfo(s.dtype).min).logsumexp(-1)
    residual = teacher.log_residual.to(s.dtype)
    symbols = torch.cat([kept, tail.unsqueeze(-1)], -1)
    log_p = torch.cat([log_p, residual.unsqueeze(-1)], -1)
    loss = tempered_divergence(symbols, log_p, settings)
    if teacher.tail_ids is None or teacher.tail_entropy is None or not teacher.tail_ids.shape[-1]:
        return loss
    drawn = (s.gather(-1, teacher.tail_ids) - tail.unsqueeze(-1)).mean(-1)
    shape = residual.exp() * (-drawn - teacher.tail_entropy.to(s.dtype))
    return loss + shape / settings.temperature**2


def linear_divergence(
    student: tuple[Tensor, Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor, Tensor | None] | TeacherTopK,
    mask: Tensor | None,
    settings: Settings,
) -> Tensor:
    """Return the loss, a mean over the unmasked rows.

    Args:
        student: hidden states [n, H], weight [V, H] and bias [V] or None.
        teacher: the same of the teacher, or its top-k.
        mask: bool [n] or None.
        settings: of the loss.
    """
    hidden, weight, bias = student
    rows = slice(None) if mask is None else mask
    s = logits(hidden[rows], weight, bias, settings.student)
    if isinstance(teacher, TeacherTopK):
        values = top_k_divergence(s, teacher.at(rows), settings)
    else:
        states, head, offset = teacher
        with torch.no_grad():
            t = logits(states[rows], head, offset, settings.teacher).to(s.dtype)
        values = tempered_divergence(s, t, settings)
    # The mean of nothing is 0, and still differentiable.
    return settings.factor * values.sum() / max(values.shape[0], 1)
