"""Losses over the tokens of a batch, from records: the seam between methods and how logits are had.

A method names a divergence and hands over the student's output and the teacher's signal; whether
logits are ever held, and where the signal came from, is decided here.
Every function returns the mean over the unmasked tokens of the batch, in float32 or better.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.objectives.divergences import Divergence
from stillhouse.records.language import LanguageOutput


def mean_over(
    mask: Bool[Tensor, "B T"], per_token: Float[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """Mean of a per-token quantity over the tokens that count; 0 when none does."""
    # where, not a product: a masked position may hold inf or NaN, and 0 * inf is NaN.
    kept = torch.where(mask, per_token, torch.zeros_like(per_token))
    return kept.sum() / mask.sum().clamp_min(1)


def log_probs(logits: Float[Tensor, "*N V"], temperature: float = 1.0) -> Float[Tensor, "*N V"]:
    """log softmax(logits / τ), computed in float32 or better."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return (wide / temperature if temperature != 1.0 else wide).log_softmax(-1)


def token_cross_entropy(
    student: LanguageOutput, labels: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """-log Q(label), nats, mean over the unmasked tokens."""
    log_q = log_probs(student.logits)
    safe_labels = labels.masked_fill(~mask, 0)
    return mean_over(mask, -log_q.gather(-1, safe_labels.unsqueeze(-1)).squeeze(-1))


def token_divergence(
    student: LanguageOutput,
    signal: LanguageOutput,
    mask: Bool[Tensor, "B T"],
    *,
    divergence: Divergence,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """D(P_τ, Q_τ), nats, mean over the unmasked tokens.

    Vocabularies of one tokenizer that are padded to different sizes are compared on the columns
    that they share: both distributions are normalised over these.
    """
    shared = min(student.vocabulary_size, signal.vocabulary_size)
    log_q = log_probs(student.logits[..., :shared], temperature)
    log_p = log_probs(signal.logits[..., :shared].detach(), temperature)
    return mean_over(mask, divergence(log_q, log_p))
