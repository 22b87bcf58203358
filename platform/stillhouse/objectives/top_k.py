"""Divergences from the teacher's k likeliest tokens: the residual bucket.

I are the teacher's k likeliest tokens, v their probabilities, m = Σ v. All other tokens are one
more symbol, the bucket, of probability 1 - m under the teacher and 1 - Q(I) under the student; a
divergence is taken between these two distributions over k + 1 symbols. Forward KL then is

    Σ_I v (log v - log Q) + (1-m) log (1-m)/(1-Q(I))

with the gradient Q - v on I and Q_j - (1-m) Q_j / (1-Q(I)) on the tail: it vanishes at Q_I = v with
tail mass 1 - m, whatever the tail's shape. Without the bucket (log-residual -inf) the kept
probabilities are blown up to v/m and the tail is driven to 0. Every divergence of the house is
convex in both arguments, so the coarse one is at most the dense one.

At another temperature than 1 both distributions are made coarse first and tempered then,
P_τ ∝ (v, 1-m)^{1/τ}: the bucket counts as one symbol on both sides, so the optimum stays where it
was, while the value differs from that of the dense distributions.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from stillhouse.records.language import TopKSignal


def coarse_log_probs(
    logits: Float[Tensor, "n V"], signal: TopKSignal, *, temperature: float
) -> tuple[Float[Tensor, "n symbols"], Float[Tensor, "n symbols"]]:
    """Return student's and teacher's log-probabilities over the k tokens and the bucket.

    Args:
        logits: the student's, over the columns that both vocabularies share.
        signal: rows; tokens outside of these columns count as impossible.
        temperature: τ.

    Returns:
        (student, teacher), [n, k + 1]; without the bucket, [n, k], when k covers all columns.
    """
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    ids, log_p = signal.token_ids, signal.log_probs.to(logits.dtype)
    missing = signal.vocabulary_size - logits.shape[-1]
    if missing:
        log_p = log_p.masked_fill(ids >= logits.shape[-1], -torch.inf)
        logits = F.pad(logits, (0, missing), value=-torch.inf)
    kept = logits.gather(-1, ids)
    if ids.shape[-1] < signal.vocabulary_size:
        # The tail is summed, never subtracted from 1: that would lose it where it is small.
        rest = logits.scatter(-1, ids, torch.finfo(logits.dtype).min)
        residual = signal.log_residual.to(logits.dtype).unsqueeze(-1)
        kept = torch.cat([kept, rest.logsumexp(-1, keepdim=True)], -1)
        log_p = torch.cat([log_p, residual], -1)
    log_q = kept.log_softmax(-1)
    if temperature != 1.0:
        log_q, log_p = (log_q / temperature).log_softmax(-1), log_p / temperature
    # Stored in float16, the teacher's probabilities sum to 1 only nearly.
    return log_q, log_p.log_softmax(-1)
