"""Losses over the tokens of a batch, from records: the seam between methods and how logits are had.

A method names a divergence and hands over the student's output and the teacher's signal; whether
logits are ever held (`LanguageOutput.loss_backend`), and where the signal came from, is decided
here. Every function returns the mean over the unmasked tokens of the batch, in float32 or better.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.objectives.divergences import Divergence
from stillhouse.objectives.fused import fused_cross_entropy, fused_divergence
from stillhouse.objectives.top_k import top_k_divergence
from stillhouse.records.language import LanguageOutput, LanguageSignal, TopKSignal


def log_probs(logits: Float[Tensor, "*N V"], temperature: float = 1.0) -> Float[Tensor, "*N V"]:
    """log softmax(logits / τ), computed in float32 or better."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return (wide / temperature if temperature != 1.0 else wide).log_softmax(-1)


def token_cross_entropy(
    student: LanguageOutput, labels: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    """-log Q(label), nats, mean over the unmasked tokens."""
    rows, labels = student.at(mask), labels[mask]
    if student.loss_backend is not None:
        return fused_cross_entropy(rows, labels)
    return mean(-log_probs(rows.logits).gather(-1, labels.unsqueeze(-1)).squeeze(-1))


def token_divergence(
    student: LanguageOutput,
    signal: LanguageSignal,
    mask: Bool[Tensor, "B T"],
    *,
    divergence: Divergence,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """D(P_τ, Q_τ), nats, mean over the unmasked tokens.

    Vocabularies of one tokenizer that are padded to different sizes are compared on the columns
    that they share: both distributions are normalised over these. What a `TopKSignal` is compared
    with, `objectives.top_k` says.

    Raises:
        UserError: what `objectives.fused` cannot do without logits.
    """
    rows, said = student.at(mask), signal.at(mask)
    if student.loss_backend is not None:
        return fused_divergence(rows, said, divergence=divergence, temperature=temperature)
    shared = min(student.vocabulary_size, signal.vocabulary_size)
    logits = rows.logits[..., :shared]
    if isinstance(said, TopKSignal):
        return mean(top_k_divergence(logits, said, divergence=divergence, temperature=temperature))
    log_p = log_probs(said.logits[..., :shared].detach(), temperature)
    return mean(divergence(log_probs(logits, temperature), log_p))


def mean(per_token: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Mean over tokens; 0, with a gradient of 0, when there are none."""
    return per_token.sum() / max(1, per_token.numel())
