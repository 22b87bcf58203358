"""Losses between the layers of two encoders: attention, relations between tokens, hidden states.

The loss of a text is a mean over its tokens, and over heads; the loss of a batch is the mean over
its texts. Padding is in no row, no column and no mean: padded positions, and texts without a token,
change nothing, whatever stands there. Everything is computed in float32 or better, under autocast
too, and no gradient flows into the teacher.

Axes: B texts, N positions, H heads, E width of a head, D hidden width.
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.divergences import forward_kl
from stillhouse.objectives.precision import wide
from stillhouse.records.encoders import AttentionTap

Mask = Bool[Tensor, "B N"]


def attention_kl(student: AttentionTap, teacher: AttentionTap, mask: Mask) -> Float[Tensor, ""]:
    """KL(A^T, A^S), A = softmax(Q Kᵀ / √E); nats, mean over heads, tokens and texts.

    Raises:
        UserError: for unequal numbers of heads.
    """
    _check_heads(student, teacher)
    ours = _products(student.queries, student.keys, mask)
    return _mean_kl(ours, _products(teacher.queries, teacher.keys, mask), mask)


def value_relation_kl(
    student: AttentionTap, teacher: AttentionTap, mask: Mask
) -> Float[Tensor, ""]:
    """KL(R^T, R^S), R = softmax(V Vᵀ / √E); nats, mean over heads, tokens and texts.

    Wang et al., "MiniLM", arXiv:2002.10957, eq. 7 and 8.

    Raises:
        UserError: for unequal numbers of heads.
    """
    _check_heads(student, teacher)
    ours = _products(student.values, student.values, mask)
    return _mean_kl(ours, _products(teacher.values, teacher.values, mask), mask)


def hidden_relation_kl(
    student: Float[Tensor, "B N D"],
    teacher: Float[Tensor, "B N Dt"],
    mask: Mask,
    *,
    heads: int,
) -> Float[Tensor, ""]:
    """KL(R^T, R^S), R_a = softmax(X_a X_aᵀ / √(D/h)), X_a the a-th of h equal slices.

    R is [N, N] on both sides, so that the widths need not be equal.

    Args:
        student, teacher: hidden states.
        mask: True at the tokens.
        heads: h, which divides both widths.

    Returns:
        Nats, mean over slices, tokens and texts.

    Raises:
        UserError: when h does not divide both widths.
    """
    widths = student.shape[-1], teacher.shape[-1]
    if heads < 1 or any(width % heads for width in widths):
        raise UserError(
            f"method.latent_loss.relation_heads={heads}: hidden states are {widths[0]} wide in the "
            f"student, {widths[1]} in the teacher; expected a divisor of both, {math.gcd(*widths)} "
            "at most"
        )
    ours, theirs = (s.unflatten(-1, (heads, -1)).transpose(1, 2) for s in (student, teacher))
    return _mean_kl(_products(ours, ours, mask), _products(theirs, theirs, mask), mask)


def attention_score_mse(
    student: AttentionTap, teacher: AttentionTap, mask: Mask
) -> Float[Tensor, ""]:
    """(U^S - U^T)², U = Q Kᵀ / √E; mean over heads, pairs of tokens, and texts.

    Jiao et al., "TinyBERT", arXiv:1909.10351, eq. 7.

    Raises:
        UserError: for unequal numbers of heads.
    """
    _check_heads(student, teacher)
    ours = _products(student.queries, student.keys, mask)
    theirs = _products(teacher.queries, teacher.keys, mask).detach()
    # Products with padding are 0 on both sides.
    squares = (ours - theirs).square().mean(1).sum((-2, -1))
    return _mean_over_texts(squares, mask.sum(-1).square())


def hidden_state_mse(
    student: Float[Tensor, "B N D"], teacher: Float[Tensor, "B N Dt"], mask: Mask
) -> Float[Tensor, ""]:
    """(H^S W_h - H^T)²; mean over features, tokens and texts.

    TinyBERT, eq. 8 and 9. The student's hidden states come here projected, H^S W_h.

    Raises:
        UserError: for unequal widths.
    """
    widths = student.shape[-1], teacher.shape[-1]
    if widths[0] != widths[1]:
        raise UserError(
            f"stages.<stage>.family.projection=false: hidden states are {widths[0]} wide in the "
            f"student, {widths[1]} in the teacher; set it to true, or take the relation form with "
            "latent@method.latent_loss=relation"
        )
    error = (wide(student) - wide(teacher.detach())).masked_fill(~mask.unsqueeze(-1), 0.0)
    return _mean_over_texts(error.square().mean(-1).sum(-1), mask.sum(-1))


def _products(
    left: Float[Tensor, "B H N E"], right: Float[Tensor, "B H N E"], mask: Mask
) -> Float[Tensor, "B H N N"]:
    """Return left rightᵀ / √E; 0 where either token is padding."""
    padding = ~mask[:, None, :, None]
    left, right = (wide(x).masked_fill(padding, 0.0) for x in (left, right))
    with torch.autocast(left.device.type, enabled=False):
        return (left / math.sqrt(left.shape[-1])) @ right.mT


def _mean_kl(
    student: Float[Tensor, "B H N N"], teacher: Float[Tensor, "B H N N"], mask: Mask
) -> Float[Tensor, ""]:
    """KL of the softmax of products over the columns that are tokens, student's first."""
    padding = ~mask[:, None, None, :]
    log_q, log_p = (
        # Not -inf, which would make the rows of a text without a token NaN.
        products.masked_fill(padding, torch.finfo(products.dtype).min).log_softmax(-1)
        for products in (student, teacher.detach())
    )
    # Rows of padding are equal on both sides, and cost nothing.
    return _mean_over_texts(forward_kl(log_q, log_p).mean(1).sum(-1), mask.sum(-1))


def _mean_over_texts(sums: Float[Tensor, "B"], counts: Tensor) -> Float[Tensor, ""]:
    """Return the mean of the texts' own means; texts that count nothing are left out."""
    return (sums / counts.clamp_min(1)).sum() / (counts > 0).sum().clamp_min(1)


def _check_heads(student: AttentionTap, teacher: AttentionTap) -> None:
    ours, theirs = student.queries.shape[1], teacher.queries.shape[1]
    if ours != theirs:
        raise UserError(
            f"student.num_attention_heads={ours}: the teacher has {theirs} heads, and attention is "
            f"compared head by head; set it to {theirs}, or compare hidden states alone with the "
            "relation form: latent@method.latent_loss=relation "
            "method.latent_loss.attention_weight=0"
        )
