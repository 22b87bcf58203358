"""Rows of the student's logits against the teacher's top-k: values and G.

All tokens outside of the k are one symbol, whose logit is the logarithm of their summed e^s. The
divergence of k + 1 symbols is `rows.tempered_rows` on a [n, k+1] problem; the vocabulary is passed
over twice, for that one logit and to spread its gradient over the tail by softmax.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from stillhouse_kernels.vocabulary_loss.rows import (
    rows_at_once,
    shape_logits,
    slope,
    tempered_rows,
)
from stillhouse_kernels.vocabulary_loss.settings import Settings, Shaping, TeacherTopK

TailLse = Callable[[Tensor], Tensor]
SpreadTail = Callable[[Tensor, Tensor, Tensor, Shaping], Tensor]


def top_k_rows(
    s: Tensor,
    teacher: TeacherTopK,
    settings: Settings,
    *,
    gradient: bool,
    tail_lse: TailLse,
    spread_tail: SpreadTail,
) -> tuple[Tensor, Tensor | None]:
    """Return D of every row, and G = ∂D/∂(logits/τ) times the soft-cap's slope.

    Args:
        s: the student's products [n, V]; spoilt.
        teacher: rows.
        settings: of the loss.
        gradient: whether G is wanted.
        tail_lse: logits [n, V] -> log Σ e^s [n].
        spread_tail: logits [n, V], that sum [n], the gradient in it [n] and the shaping -> G [n, V]
            in whatever storage.

    Returns:
        D [n]; G [n, V] or None.
    """
    shape_logits(s, settings.student)
    ids, cap, tau = teacher.ids, settings.student, settings.temperature
    kept = s.gather(-1, ids)
    kept_slope = slope(kept, cap) if gradient else None
    drawn = None if teacher.tail_ids is None else s.gather(-1, teacher.tail_ids)
    log_p = teacher.log_probs.to(s.dtype)
    bucket = ids.shape[-1] < s.shape[-1]
    tail = s.new_empty(0)
    symbols, reference = kept, log_p.clone()
    if bucket:
        # Not -inf: a tail that is impossible throughout keeps a finite sum.
        tail = tail_lse(s.scatter_(-1, ids, torch.finfo(s.dtype).min))
        residual = teacher.log_residual.to(s.dtype)
        symbols = torch.cat([kept, tail.unsqueeze(-1)], -1)
        reference = torch.cat([log_p, residual.unsqueeze(-1)], -1)
    scratch = s.new_empty(3, *symbols.shape)
    values = tempered_rows(symbols, reference, settings, scratch, gradient)
    into_tail = symbols[:, -1]
    mass = None
    if bucket and drawn is not None and teacher.tail_entropy is not None and drawn.shape[-1]:
        mass = teacher.log_residual.to(s.dtype).exp()
        code_length = tail - drawn.mean(-1) - teacher.tail_entropy.to(s.dtype)
        values = values + mass * code_length / tau**2
        into_tail = into_tail + mass / tau
    if not gradient:
        return values, None
    into_kept = symbols[:, : ids.shape[-1]]
    if kept_slope is not None:
        into_kept = into_kept * kept_slope
    G = spread_tail(s, tail, into_tail, cap) if bucket else s.zero_()
    # Added and not written: an id that stands twice gets both gradients.
    G.scatter_(-1, ids, 0.0).scatter_add_(-1, ids, into_kept.to(G.dtype))
    if mass is not None and drawn is not None and teacher.tail_ids is not None:
        share = (-mass / (tau * drawn.shape[-1])).unsqueeze(-1).expand_as(drawn)
        drawn_slope = slope(drawn, cap)
        share = share if drawn_slope is None else share * drawn_slope
        G.scatter_add_(-1, teacher.tail_ids, share.to(G.dtype))
    return values, G


def torch_tail_lse(s: Tensor) -> Tensor:
    """log Σ e^s over the vocabulary [n], by blocks of rows."""
    height = rows_at_once(s.shape[1])
    return torch.cat([block.logsumexp(-1) for block in s.split(height)])


def torch_spread_tail(s: Tensor, lse: Tensor, into_tail: Tensor, shaping: Shaping) -> Tensor:
    """softmax(s) times the gradient in the tail's symbol and the soft-cap's slope, in place."""
    height = rows_at_once(s.shape[1])
    for start in range(0, s.shape[0], height):
        block = slice(start, start + height)
        outer = slope(s[block], shaping)
        s[block].sub_(lse[block].unsqueeze(-1)).exp_().mul_(into_tail[block].unsqueeze(-1))
        if outer is not None:
            s[block].mul_(outer.clamp_(min=0.0))  # -inf at the kept tokens
    return s
