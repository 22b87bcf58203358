"""Losses over the tokens of a batch, from records: the seam between methods and how logits are had.

A method names a divergence and hands over the student's output and the teacher's signal; whether
logits are ever held (`LanguageOutput.loss_backend`), and where the signal came from, is decided
here. Every loss is the mean over the unmasked tokens of the batch, in float32 or better.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.divergences import Divergence
from stillhouse.objectives.fused import fused_cross_entropy, fused_divergence
from stillhouse.objectives.top_k import top_k_divergence
from stillhouse.records.language import LanguageOutput, LanguageSignal, TopKSignal

# Logits that are held at once where a loss backend is there to hold few: 64 MB in float32.
LOGITS_HELD = 2**24


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


@torch.no_grad()
def likeliest_tokens(
    student: LanguageOutput, signal: LanguageSignal, mask: Bool[Tensor, "B T"]
) -> Int[Tensor, "n"]:
    """Return the teacher's likeliest token at each of the unmasked positions.

    Only tokens that both vocabularies have are looked at. Where the student's loss has a backend,
    the teacher's logits are computed for a few positions at a time.

    Raises:
        UserError: when none of the tokens of a cached signal is among these.
    """
    shared = min(student.vocabulary_size, signal.vocabulary_size)
    if isinstance(signal, TopKSignal):
        return _likeliest_kept(signal.token_ids[mask], signal.log_probs[mask], shared)
    said = signal.at(mask)
    if student.loss_backend is None:
        return said.logits[..., :shared].argmax(-1)
    head, rows = said.head.of_first(shared), max(1, LOGITS_HELD // shared)
    return torch.cat([head(states).argmax(-1) for states in said.hidden_states.split(rows)])


def _likeliest_kept(
    ids: Int[Tensor, "n k"], log_p: Float[Tensor, "n k"], shared: int
) -> Int[Tensor, "n"]:
    unknown = ids >= shared
    if unknown.all(-1).any():
        raise UserError(
            f"codec.k={ids.shape[-1]}: at some positions the student knows none of the kept "
            f"tokens, only those below {shared}; expected more tokens, or teacher=live"
        )
    likeliest = log_p.masked_fill(unknown, -torch.inf).argmax(-1, keepdim=True)
    return ids.gather(-1, likeliest).squeeze(-1)


def mean(per_token: Float[Tensor, "n"]) -> Float[Tensor, ""]:
    """Mean over tokens; 0, with a gradient of 0, when there are none."""
    return per_token.sum() / max(1, per_token.numel())
