"""The losses of `objectives.tokens` without the logits, through a kernel that holds a few of them.

Rows in, the mean over them out. Which backend of the kernel runs, the student's output says.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.divergences import Divergence, NamedDivergence
from stillhouse.records.language import LanguageOutput, LanguageSignal, TopKSignal, VocabularyHead
from stillhouse_kernels import BackendError, TeacherTopK, linear_divergence


def fused_cross_entropy(student: LanguageOutput, labels: Int[Tensor, "n"]) -> Float[Tensor, ""]:
    """-log Q(label): the forward KL from a teacher that is certain."""
    certain = torch.zeros_like(labels, dtype=torch.float32)
    label = TeacherTopK(labels.long().unsqueeze(-1), certain.unsqueeze(-1), certain - torch.inf)
    return _mean_divergence(student, student.head, label, divergence="forward_kl")


def fused_divergence(
    student: LanguageOutput, signal: LanguageSignal, *, divergence: Divergence, temperature: float
) -> Float[Tensor, ""]:
    """D(P_τ, Q_τ) over the columns that both vocabularies share.

    Raises:
        UserError: for a divergence without a name, or a cached signal over tokens that the student
            does not know.
    """
    if not isinstance(divergence, NamedDivergence):
        raise UserError(
            f"{_key(student)}: this method's divergence is none of objectives.divergences; set it "
            "to null"
        )
    shared = min(student.vocabulary_size, signal.vocabulary_size)
    if isinstance(signal, TopKSignal):
        if signal.vocabulary_size > shared:
            raise UserError(
                f"{_key(student)}: the cached signal is over {signal.vocabulary_size} tokens, the "
                f"student knows {shared}; set it to null"
            )
        teacher = TeacherTopK(
            signal.token_ids,
            signal.log_probs,
            signal.log_residual,
            signal.tail_ids,
            signal.tail_entropy,
        )
    else:
        teacher = (signal.hidden_states, signal.head.of_first(shared))
    return _mean_divergence(
        student,
        student.head.of_first(shared),
        teacher,
        divergence=divergence.name,
        temperature=temperature,
        **divergence.weights,
    )


def _mean_divergence(
    student: LanguageOutput,
    head: VocabularyHead,
    teacher: TeacherTopK | tuple[Tensor, VocabularyHead],
    **options: Any,
) -> Float[Tensor, ""]:
    assert student.loss_backend is not None
    options |= {"student_bias": head.bias, "backend": student.loss_backend}
    hidden_states = weight = None
    if isinstance(teacher, TeacherTopK):
        options |= {
            "teacher_topk": teacher,
            "logit_softcap": head.logit_softcap,
            "logit_scale": head.logit_scale,
        }
    else:
        hidden_states, theirs = teacher
        weight = theirs.weight
        options |= {
            "teacher_bias": theirs.bias,
            "logit_softcap": (head.logit_softcap, theirs.logit_softcap),
            "logit_scale": (head.logit_scale, theirs.logit_scale),
        }
    try:
        return linear_divergence(
            student.hidden_states, head.weight, hidden_states, weight, **options
        )
    except BackendError as error:
        raise UserError(f"stages.<stage>.family.loss_backend: {error}") from error


def _key(student: LanguageOutput) -> str:
    return f"stages.<stage>.family.loss_backend={student.loss_backend}"
