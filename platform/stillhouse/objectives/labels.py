"""Losses between an encoder's logits and what is known of a text: its label, a teacher's logits.

Which form they take, the labels say: [B] whole numbers are classes, [B] floats the targets of a
regression, [B, C] floats several labels that may hold at once. Every loss is a mean over the texts
that have a token, in float32 or better; no gradient flows into the teacher.

Axes: B texts, C classes or targets.
"""

import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.precision import wide
from stillhouse.objectives.tokens import log_probs, mean
from stillhouse.records.encoders import EncoderBatch, EncoderOutput


def hard_label_loss(student: EncoderOutput, batch: EncoderBatch) -> Float[Tensor, ""]:
    """L_hard: the cross-entropy of the class, the squared error, or the mean over several labels.

    Raises:
        UserError: when the texts have no labels, or the student no head.
    """
    labels, texts = _labels_of(batch), batch.attention_mask.any(-1)
    logits, labels = _logits_of(student, "student")[texts], labels[texts]
    if labels.ndim == 2:
        return mean(binary_cross_entropy(logits, labels))
    if labels.is_floating_point():
        return mean(squared_error(logits, labels.unsqueeze(-1)))
    return mean(-log_probs(logits).gather(-1, labels.long().unsqueeze(-1)).squeeze(-1))


def soft_label_loss(
    student: EncoderOutput, signal: EncoderOutput, batch: EncoderBatch, *, temperature: float
) -> Float[Tensor, ""]:
    """L_soft: the same against the teacher's logits; of labels, only their kind is read.

    The squared error of a regression knows no temperature.

    Raises:
        UserError: when the texts have no labels, one of the two has no head, or their heads are of
            other sizes.
    """
    labels, texts = _labels_of(batch), batch.attention_mask.any(-1)
    ours, theirs = _logits_of(student, "student"), _logits_of(signal, "teacher")
    if ours.shape != theirs.shape:
        raise UserError(
            f"teacher.path: its head has {theirs.shape[-1]} outputs, the student's "
            f"{ours.shape[-1]}; expected a teacher that was fine-tuned on this task"
        )
    ours, theirs = ours[texts], theirs[texts]
    if labels.ndim == 2:
        return mean(soft_binary_cross_entropy(ours, theirs, temperature=temperature))
    if labels.is_floating_point():
        return mean(squared_error(ours, theirs.detach()))
    return mean(soft_cross_entropy(ours, theirs, temperature=temperature))


def soft_cross_entropy(
    student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], *, temperature: float = 1.0
) -> Float[Tensor, "B"]:
    """-τ² Σ_c softmax(z^T/τ)_c log softmax(z^S/τ)_c, nats; gradient τ (Q_τ - P_τ)."""
    p = log_probs(teacher.detach(), temperature).exp()
    return -(temperature**2) * (p * log_probs(student, temperature)).sum(-1)


def soft_binary_cross_entropy(
    student: Float[Tensor, "B C"], teacher: Float[Tensor, "B C"], *, temperature: float = 1.0
) -> Float[Tensor, "B"]:
    """τ² times the cross-entropy of C coins σ(z/τ), nats, mean over the coins."""
    p = (wide(teacher.detach()) / temperature).sigmoid()
    return temperature**2 * binary_cross_entropy(wide(student) / temperature, p)


def binary_cross_entropy(
    logits: Float[Tensor, "B C"], labels: Float[Tensor, "B C"]
) -> Float[Tensor, "B"]:
    """-y log σ(z) - (1-y) log(1-σ(z)), nats, mean over the labels."""
    logits = wide(logits)
    return F.binary_cross_entropy_with_logits(logits, labels.to(logits), reduction="none").mean(-1)


def squared_error(
    predictions: Float[Tensor, "B 1"], targets: Float[Tensor, "B 1"]
) -> Float[Tensor, "B"]:
    """(z - y)²."""
    return (wide(predictions) - wide(targets)).square().squeeze(-1)


def _labels_of(batch: EncoderBatch) -> Num[Tensor, "B *C"]:
    if batch.labels is None:
        raise UserError(
            "data: its texts have no labels, which this method needs; expected a labelled set such "
            "as data=sentiment, or a method without labels such as method=ernie_tiny_latent"
        )
    return batch.labels


def _logits_of(output: EncoderOutput, whose: str) -> Float[Tensor, "B C"]:
    if output.logits is None:
        raise UserError(
            f"{whose}: it has no head for the task; expected an encoder of a labelled set of data, "
            "fine-tuned where it is the teacher"
        )
    return output.logits
