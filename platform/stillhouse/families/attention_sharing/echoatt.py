"""EchoAtt: distillation of a student whose inner layers share attention matrices.

Hossein Rajabzadeh, Aref Jafari et al., "EchoAtt: Attend, Copy, then Adjust for More Efficient Large
Language Models", arXiv:2409.14595.

Stage 1, on the tokens x of the data; S_l and T_l are the student's and the teacher's hidden states
after layer l, l(i) the last layer of group i of m, S and T the logits:

    L   = α L_I + β L_S + γ L_H,             (α, β, γ) = (0.25, 0.25, 0.5)
    L_I = 1/m Σ_i ‖S_l(i)(x) - T_l(i)(x)‖²   hidden states where a group ends
    L_S = KL(softmax S(x), softmax T(x))     student first, as printed; no temperature
    L_H = CE(softmax S(x), argmax T(x))      the teacher's top-1, not a draw

Stage 2 is `sft`: the cross-entropy of the data, no teacher.

Unconfirmed, for there is no public code: the reduction of L_I, here the mean over tokens and
features; and whether the authors' L_S is the KL as printed, `reverse_kl`, or `forward_kl`. Behind
the last block the hidden states are those that the head reads, normalised, as in `transformers`.

The paper's α, β, γ are `intermediate_weight`, `soft_weight`, `hard_weight`; the keys `alpha` and
`beta` belong to the divergence.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.divergences import DivergenceName, named_divergence
from stillhouse.objectives.features import hidden_mse
from stillhouse.objectives.tokens import likeliest_tokens, token_cross_entropy, token_divergence
from stillhouse.ranges import Weight
from stillhouse.records.language import LanguageOutput, LanguageSignal, SequenceBatch
from stillhouse.records.losses import LossTerms


def echoatt(
    student: LanguageOutput,
    signal: LanguageSignal,
    batch: SequenceBatch,
    *,
    intermediate_weight: Weight = 0.25,
    soft_weight: Weight = 0.25,
    hard_weight: Weight = 0.5,
    divergence: DivergenceName = "reverse_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
) -> LossTerms:
    """Return the loss of stage 1, a mean over the tokens that count.

    A term of weight 0 is not computed. Where nothing is shared there are no groups and L_I is 0.

    Args:
        student: the student's output, with the hidden states of the layers of `signal`.
        signal: the teacher's, at the same positions, with those where a group ends.
        batch: the sequences; its labels are not read.
        intermediate_weight: α, of L_I.
        soft_weight: β, of L_S.
        hard_weight: γ, of L_H.
        divergence: of L_S, a name of the table in `objectives.divergences`.
        beta: β of `jsd`.
        alpha: α of the skewed divergences.

    Raises:
        UserError: for a weight below 0, weights that leave no loss, or layers of the student that
            are not the signal's.
    """
    _check_weights(intermediate_weight, soft_weight, hard_weight, groups=len(signal.layers))
    parts: list[tuple[str, float, Tensor]] = []
    if intermediate_weight > 0:
        L_I = intermediate_loss(student, signal, batch, weight=intermediate_weight)
        parts.append(("hidden_mse", intermediate_weight, L_I))
    if soft_weight > 0:
        measure = named_divergence(divergence, beta=beta, alpha=alpha)
        L_S = token_divergence(student, signal, batch.mask, divergence=measure)
        parts.append((divergence, soft_weight, L_S))
    if hard_weight > 0:
        likeliest = likeliest_tokens(student, signal, batch.mask)
        labels = batch.labels.masked_scatter(batch.mask, likeliest)
        L_H = token_cross_entropy(student, labels, batch.mask)
        parts.append(("hard_cross_entropy", hard_weight, L_H))
    return LossTerms(
        total=torch.stack([weight * term for _, weight, term in parts]).sum(),
        terms={name: term.detach() for name, _, term in parts},
    )


def intermediate_loss(
    student: LanguageOutput, signal: LanguageSignal, batch: SequenceBatch, *, weight: float
) -> Float[Tensor, ""]:
    """Return L_I, the mean over the groups; 0 where there are none.

    Args:
        student: with the layers of the signal.
        signal: with the hidden states where a group ends.
        batch: says which tokens count.
        weight: α, for messages.

    Raises:
        UserError: when one has layers that the other has not, or their widths differ.
    """
    if student.layers.keys() != signal.layers.keys():
        raise UserError(
            f"stages.<stage>.family.layers={sorted(student.layers)}: the teacher's signal has the "
            f"hidden states of {sorted(signal.layers)}; set teacher.layers and this to the same "
            "layers"
        )
    ours, theirs = student.at(batch.mask).layers, signal.at(batch.mask).layers
    for layer in theirs:
        if ours[layer].shape != theirs[layer].shape:
            raise UserError(
                f"method.intermediate_weight={weight}: behind layer {layer} the student is "
                f"{ours[layer].shape[-1]} wide, the teacher {theirs[layer].shape[-1]}; expected a "
                "student cut from this teacher, or 0"
            )
    errors = [hidden_mse(ours[layer], theirs[layer]) for layer in theirs]
    if not errors:
        return torch.zeros((), device=student.hidden_states.device)
    return torch.stack(errors).mean()


def _check_weights(intermediate: float, soft: float, hard: float, *, groups: int) -> None:
    weights = {"intermediate_weight": intermediate, "soft_weight": soft, "hard_weight": hard}
    for name, weight in weights.items():
        if not weight >= 0:
            raise UserError(f"method.{name}={weight}: expected 0 or more")
    if intermediate * groups + soft + hard == 0:
        raise UserError(
            f"method.soft_weight={soft}, method.hard_weight={hard}: with "
            f"method.intermediate_weight={intermediate} and {groups} groups no loss is left; "
            "expected one of the two above 0"
        )
