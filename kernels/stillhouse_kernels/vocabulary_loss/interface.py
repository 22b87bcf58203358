"""The public function: arguments checked, autocast applied, the implementation called."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stillhouse_kernels.vocabulary_loss import reference
from stillhouse_kernels.vocabulary_loss.arguments import (
    Pair,
    check_ids,
    check_numbers,
    check_tensors,
    checked_top_k,
    checked_weight,
    shapings,
)
from stillhouse_kernels.vocabulary_loss.operators import linear_divergence_op
from stillhouse_kernels.vocabulary_loss.settings import Settings, TeacherTopK, canonical


def linear_divergence(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    *,
    divergence: str = "forward_kl",
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
    beta: float | None = None,
    alpha: float | None = None,
    mask: Tensor | None = None,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    logit_softcap: Pair = None,
    logit_scale: Pair = None,
    teacher_topk: TeacherTopK | Sequence[Tensor] | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the mean divergence of two vocabulary heads without their [tokens, vocabulary] logits.

    logits = softcap(scale · (h Wᵀ + b)) with softcap(x) = c tanh(x / c); P = softmax(t/τ) is the
    teacher's distribution, Q = softmax(s/τ) the student's. Gradients flow to the student's hidden
    states, weight and bias, and only once: a second backward pass through them raises.

    Args:
        student_hidden: [tokens, width]; the states that the head reads.
        student_weight: [vocabulary, width].
        teacher_hidden, teacher_weight: the teacher's, of any width; None with `teacher_topk`. The
            vocabularies are equal: the caller slices padded ones. A teacher may have a dtype of its
            own.
        divergence: `forward_kl` KL(P, Q), `reverse_kl` KL(Q, P), `jsd` β KL(P, M) + (1-β) KL(Q, M)
            with M = β P + (1-β) Q, `skew_forward_kl` KL(P, α P + (1-α) Q), `skew_reverse_kl`
            KL(Q, (1-α) P + α Q), `total_variation` ½ Σ |P - Q|; nats.
        temperature: τ.
        scale_by_temperature_squared: whether the loss is multiplied by τ^2.
        beta: β in [0, 1], 0.5 where None; at 0 and 1 JSD is forward and reverse KL.
        alpha: α in [0, 1), 0.1 where None.
        mask: bool [tokens]; True = the token counts. Others may hold inf and NaN.
        student_bias, teacher_bias: [vocabulary] or None.
        logit_softcap, logit_scale: c and scale, a value or a pair (student, teacher); None = none.
        teacher_topk: in place of the teacher's states and head: (ids, log_probs, log_residual), or
            a `TeacherTopK`. All other tokens are one symbol.
        chunk_size: tokens whose logits exist at a time; None: 64 to 384 on a CPU, 1024 on a GPU.
        backend: `auto`, `reference`, `streaming` or `triton`.

    Returns:
        The mean over the tokens that count, in float32 (float64 for float64); 0 where none does.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, a number outside of its range,
            both or neither of teacher and top-k, an id outside of the vocabulary, or a backend that
            cannot run here.
    """
    weights = checked_weight(divergence, beta, alpha)
    check_numbers(temperature, chunk_size)
    top_k = checked_top_k(teacher_hidden, teacher_weight, teacher_bias, teacher_topk)
    teacher_hidden, teacher_weight, teacher_bias = (
        None if t is None else t.detach() for t in (teacher_hidden, teacher_weight, teacher_bias)
    )
    student_dtype, autocast = _product_dtype(student_hidden)
    tensors = {
        "student_hidden": student_hidden,
        "student_weight": student_weight,
        "student_bias": student_bias,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": teacher_weight,
        "teacher_bias": teacher_bias,
        **({} if top_k is None else top_k._asdict()),
        "mask": mask,
    }
    check_tensors(tensors, autocast=autocast)
    teacher_dtype = student_dtype
    if teacher_hidden is not None:
        teacher_dtype, _ = _product_dtype(teacher_hidden)
    student_shaping, teacher_shaping = shapings(logit_scale, logit_softcap)
    name, weight = canonical(divergence, *weights)
    factor = float(temperature) ** 2 if scale_by_temperature_squared else 1.0
    settings = Settings(
        name, float(weight), float(temperature), factor, student_shaping, teacher_shaping
    )
    if backend == "reference":
        return _reference(tensors, top_k, settings, student_dtype, teacher_dtype)
    grad = torch.is_grad_enabled()
    loss, *_ = linear_divergence_op(
        student_hidden,
        student_weight,
        student_bias,
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        *((None,) * 5 if top_k is None else top_k),
        mask,
        settings.divergence,
        settings.weight,
        settings.temperature,
        settings.factor,
        student_shaping.scale,
        student_shaping.softcap,
        teacher_shaping.scale,
        teacher_shaping.softcap,
        student_dtype,
        teacher_dtype,
        chunk_size,
        backend,
        grad and student_hidden.requires_grad,
        grad and student_weight.requires_grad,
        grad and student_bias is not None and student_bias.requires_grad,
    )
    return loss


def _product_dtype(hidden: Tensor) -> tuple[torch.dtype, bool]:
    """The dtype that a linear layer would multiply in here, and whether autocast sets it."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device), True
    return hidden.dtype, False


def _reference(
    tensors: dict[str, Tensor | None],
    top_k: TeacherTopK | None,
    settings: Settings,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
) -> Tensor:
    def cast(model: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        hidden, weight, bias = (tensors[f"{model}_{part}"] for part in ("hidden", "weight", "bias"))
        assert hidden is not None
        assert weight is not None
        return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)

    student, mask = cast("student", student_dtype), tensors["mask"]
    if top_k is not None:
        check_ids(top_k, mask, student[1].shape[0])
    with torch.autocast(student[0].device.type, enabled=False):
        teacher = cast("teacher", teacher_dtype) if top_k is None else top_k
        return reference.linear_divergence(student, teacher, mask, settings)
