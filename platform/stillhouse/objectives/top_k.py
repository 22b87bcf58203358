"""Divergences from the teacher's k likeliest tokens, the mass of the others, and draws from them.

I are the teacher's k likeliest tokens, v their probabilities, m = Σ v. All other tokens together
are one more symbol, the bucket, of probability 1 - m under the teacher and 1 - Q(I) under the
student. A divergence is taken between these two distributions over k + 1 symbols; forward KL is

    Σ_I v (log v - log Q) + (1-m) log (1-m)/(1-Q(I))

with the gradient Q - v on I and Q_j - (1-m) Q_j / (1-Q(I)) on the tail: it vanishes at Q_I = v with
tail mass 1 - m, whatever the tail's shape. Without the bucket (log-residual -inf) the kept
probabilities are blown up to v/m and the tail is driven to 0.

What the bucket leaves out is the tail's shape. By the chain rule of the KL,

    KL(P, Q) = KL of the k + 1 symbols + (1-m) KL(P_tail, Q_tail)

and the second term is estimated from tokens j_1 … j_s drawn from P_tail, without bias in value and
gradient: (1-m) (-1/s Σ log Q_tail(j) - H(P_tail)). For forward KL the sum is an unbiased estimate
of the dense loss. To another divergence the same term is added: the minimum stays at Q = P.

At another temperature than 1 the distributions over k + 1 symbols are tempered, (v, 1-m)^{1/τ}:
the bucket counts as one symbol on both sides, so the optimum stays where it was, while the value
differs from that of the dense distributions. The tail's term stays at temperature 1 and is divided
by τ^2, the scale to which a temperature shrinks the other's gradient.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.objectives.divergences import Divergence
from stillhouse.records.language import TopKSignal


def top_k_divergence(
    logits: Float[Tensor, "n V"],
    signal: TopKSignal,
    *,
    divergence: Divergence,
    temperature: float = 1.0,
) -> Float[Tensor, "n"]:
    """D over the k tokens and the bucket, plus the estimate of the tail's term, nats.

    Args:
        logits: the student's, over the columns that both vocabularies share.
        signal: rows; tokens outside of these columns count as impossible.
        divergence: of (student, teacher) log-probabilities.
        temperature: τ.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    ids, log_p = signal.token_ids, signal.log_probs.to(logits.dtype)
    missing = signal.vocabulary_size - logits.shape[-1]
    if missing:
        log_p = log_p.masked_fill(ids >= logits.shape[-1], -torch.inf)
        logits = F.pad(logits, (0, missing), value=-torch.inf)
    kept = logits.gather(-1, ids)
    if ids.shape[-1] == signal.vocabulary_size:
        return _coarse(kept, log_p, divergence, temperature)
    # The tail is summed, never subtracted from 1: that would lose it where it is small.
    tail = logits.scatter(-1, ids, torch.finfo(logits.dtype).min).logsumexp(-1)
    residual = signal.log_residual.to(logits.dtype)
    symbols = torch.cat([kept, tail.unsqueeze(-1)], -1)
    log_p = torch.cat([log_p, residual.unsqueeze(-1)], -1)
    loss = _coarse(symbols, log_p, divergence, temperature)
    if signal.tail_ids.shape[-1] == 0:
        return loss
    drawn = logits.gather(-1, signal.tail_ids) - tail.unsqueeze(-1)
    possible = signal.tail_ids < logits.shape[-1] - missing
    mean = drawn.masked_fill(~possible, 0).sum(-1) / possible.sum(-1).clamp_min(1)
    shape = residual.exp() * (-mean - signal.tail_entropy.to(logits.dtype))
    return loss + shape / temperature**2


def _coarse(
    logits: Float[Tensor, "n symbols"],
    log_p: Float[Tensor, "n symbols"],
    divergence: Divergence,
    temperature: float,
) -> Float[Tensor, "n"]:
    log_q = logits.log_softmax(-1)
    if temperature != 1.0:
        log_q, log_p = (log_q / temperature).log_softmax(-1), log_p / temperature
    # Stored in float16, the teacher's probabilities sum to 1 only nearly.
    return divergence(log_q, log_p.log_softmax(-1))
