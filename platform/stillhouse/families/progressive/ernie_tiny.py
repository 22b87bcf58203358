"""ERNIE-Tiny: a pretrained encoder distilled in four stages, one change a stage.

Weiyue Su et al., "ERNIE-Tiny: A Progressive Distillation Framework for Pretrained Transformer
Compression", arXiv:2106.02241.

| stage                           | teacher      | data             | loss                    |
|---------------------------------|--------------|------------------|-------------------------|
| general distillation            | pretrained P | general text     | L_lat                   |
| general-enhanced distillation   | fine-tuned F | general text     | L_lat                   |
| task-adaptive distillation      | F            | the task's texts | L_lat                   |
| task-specific distillation      | F            | the task's texts | L_lat + L_soft + L_hard |

    L_lat  = Σ_l (L_att(l) + L_hid(l))      over the matched layers, l -> g(l), the family's map
    L_soft = -τ² Σ_c softmax(z^T/τ)_c log softmax(z^S/τ)_c
    L_hard = -log softmax(z^S)_y            regression: the squared error for both

`latent` is L_lat, `ernie_tiny` the loss of the last stage. The paper names attention and hidden
states as what L_lat compares; its form is unconfirmed, for there is no public code. Three are here,
A attention, U its scores, H hidden states, V values, S the student's and T the teacher's:

    relation   L_att = KL(A^T, A^S)    L_hid = KL(R^T, R^S), R = softmax(H_a H_aᵀ / √(D/h)), H_a a
                                       slice of h
    tinybert   L_att = MSE(U^S, U^T)   L_hid = MSE(H^S W_h, H^T)              Jiao et al. 1909.10351
    minilm     L_att = KL(A^T, A^S)    L_hid = KL(R^T, R^S), R = softmax(V Vᵀ / √E), of the last
                                       layer alone                            Wang et al. 2002.10957

The weights of the last stage and τ are unconfirmed, too; all are 1 here.
"""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.labels import hard_label_loss, soft_label_loss
from stillhouse.objectives.relations import (
    attention_kl,
    attention_score_mse,
    hidden_relation_kl,
    hidden_state_mse,
    value_relation_kl,
)
from stillhouse.ranges import Count, Positive, Weight
from stillhouse.records.encoders import EncoderBatch, EncoderOutput
from stillhouse.records.losses import LossTerms

Mask = Bool[Tensor, "B N"]
Terms = Mapping[str, Float[Tensor, ""]]
LatentLoss = Callable[[EncoderOutput, EncoderOutput, Mask], Terms]


def latent(
    student: EncoderOutput,
    signal: EncoderOutput | None,
    batch: EncoderBatch,
    *,
    latent_loss: LatentLoss,
) -> LossTerms:
    """Return L_lat, the loss of the first three stages, a mean over the texts.

    Args:
        student: the student's output, with the matched layers.
        signal: the teacher's, its layers under the student's numbers.
        batch: the texts; labels are not read.
        latent_loss: `relation`, `tinybert` or `minilm`, called with (student, signal, mask); L_lat
            is the sum of its terms.

    Raises:
        UserError: without a teacher, when no block is matched, or as the form says.
    """
    said = _check_teacher(signal)
    if not said.attention:
        raise UserError(
            "stages.<stage>.family.layer_map: no block of the student is matched with one of the "
            "teacher, which L_lat compares; expected a map of some, such as "
            "layer_map@stages.<stage>.family.layer_map=uniform"
        )
    terms = latent_loss(student, said, batch.attention_mask)
    return LossTerms(
        total=_sum(terms.values()),
        terms={name: term.detach() for name, term in terms.items()},
    )


def ernie_tiny(
    student: EncoderOutput,
    signal: EncoderOutput | None,
    batch: EncoderBatch,
    *,
    latent_loss: LatentLoss,
    latent_weight: Weight = 1.0,
    soft_weight: Weight = 1.0,
    hard_weight: Weight = 1.0,
    temperature: Positive = 1.0,
) -> LossTerms:
    """Return L_lat + L_soft + L_hard, the loss of the last stage, a mean over the texts.

    A term of weight 0 is not computed.

    Args:
        student: the student's output, with the matched layers and its logits.
        signal: the teacher's, alike.
        batch: the texts with their labels.
        latent_loss: as in `latent`.
        latent_weight: of L_lat.
        soft_weight: of L_soft.
        hard_weight: of L_hard.
        temperature: τ of L_soft.

    Raises:
        UserError: as `latent`; for a weight below 0, weights that leave no loss, a temperature of 0
            or less, texts without labels, or a student or a teacher without a head.
    """
    _check_weights(
        {
            "method.latent_weight": latent_weight,
            "method.soft_weight": soft_weight,
            "method.hard_weight": hard_weight,
        }
    )
    if not temperature > 0:
        raise UserError(f"method.temperature={temperature}: expected a number above 0")
    said = _check_teacher(signal)
    weighted: list[Tensor] = []
    terms: dict[str, Tensor] = {}
    if latent_weight > 0:
        L_lat = latent(student, said, batch, latent_loss=latent_loss)
        weighted.append(latent_weight * L_lat.total)
        terms |= L_lat.terms
    if soft_weight > 0:
        L_soft = soft_label_loss(student, said, batch, temperature=temperature)
        weighted.append(soft_weight * L_soft)
        terms["soft_labels"] = L_soft.detach()
    if hard_weight > 0:
        L_hard = hard_label_loss(student, batch)
        weighted.append(hard_weight * L_hard)
        terms["hard_labels"] = L_hard.detach()
    return LossTerms(total=_sum(weighted), terms=terms)


def relation(
    student: EncoderOutput,
    signal: EncoderOutput,
    mask: Mask,
    *,
    relation_heads: Count | None = None,
    attention_weight: Weight = 1.0,
    hidden_weight: Weight = 1.0,
) -> Terms:
    """KL of attention and KL of relations between hidden states, each summed over the layers.

    It needs no projection: widths may differ.

    Args:
        student, signal: the layers of both.
        mask: True at the tokens.
        relation_heads: h, slices of hidden states, a divisor of both widths; None takes as many as
            the student has attention heads.
        attention_weight: of L_att; 0 leaves it out, so that the numbers of heads may differ.
        hidden_weight: of L_hid; 0 leaves it out.

    Raises:
        UserError: for a weight below 0, weights that leave no loss, unequal numbers of heads, or
            slices that do not divide a width.
    """
    _check_weights(
        {
            "method.latent_loss.attention_weight": attention_weight,
            "method.latent_loss.hidden_weight": hidden_weight,
        }
    )
    terms: dict[str, Tensor] = {}
    if attention_weight > 0:
        ours, theirs = student.attention, signal.attention
        L_att = _sum(attention_kl(ours[n], theirs[n], mask) for n in theirs)
        terms["attention_kl"] = attention_weight * L_att
    if hidden_weight > 0:
        states, targets = student.hidden_states, signal.hidden_states
        if relation_heads is None:
            relation_heads = next(iter(student.attention.values())).queries.shape[1]
        L_hid = _sum(
            hidden_relation_kl(states[n], targets[n], mask, heads=relation_heads) for n in targets
        )
        terms["hidden_relation_kl"] = hidden_weight * L_hid
    return terms


def tinybert(student: EncoderOutput, signal: EncoderOutput, mask: Mask) -> Terms:
    """Squared errors of attention scores and of hidden states, each summed over the layers.

    Widths that differ need the family's `projection`.

    Raises:
        UserError: for unequal numbers of heads, or unequal widths.
    """
    ours, theirs = student.attention, signal.attention
    states, targets = student.hidden_states, signal.hidden_states
    return {
        "score_mse": _sum(attention_score_mse(ours[n], theirs[n], mask) for n in theirs),
        "hidden_mse": _sum(hidden_state_mse(states[n], targets[n], mask) for n in targets),
    }


def minilm(student: EncoderOutput, signal: EncoderOutput, mask: Mask) -> Terms:
    """KL of attention and KL of relations between values, of the last matched layer alone.

    Raises:
        UserError: for unequal numbers of heads.
    """
    top = max(signal.attention)
    ours, theirs = student.attention[top], signal.attention[top]
    return {
        "attention_kl": attention_kl(ours, theirs, mask),
        "value_relation_kl": value_relation_kl(ours, theirs, mask),
    }


def _sum(losses: Iterable[Tensor]) -> Float[Tensor, ""]:
    return torch.stack(list(losses)).sum()


def _check_teacher(signal: EncoderOutput | None) -> EncoderOutput:
    if signal is None:
        raise UserError(
            "teacher=null: this method needs one; expected teacher=encoder with teacher.path, or "
            "method=finetune"
        )
    return signal


def _check_weights(weights: Mapping[str, float]) -> None:
    for key, weight in weights.items():
        if not weight >= 0:
            raise UserError(f"{key}={weight}: expected 0 or more")
    if not any(weights.values()):
        said = ", ".join(f"{key}={weight}" for key, weight in weights.items())
        raise UserError(f"{said}: no loss is left; expected one of them above 0")
