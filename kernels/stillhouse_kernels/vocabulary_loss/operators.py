"""The loss as a custom operation: its gradients come with its value and wait for the backward.

Opaque to `torch.compile`, which sees one node with four outputs. The backward multiplies by the
incoming scalar; there is no second one.
"""

from typing import Any

import torch
from torch import Tensor

from stillhouse_kernels.dispatch import choose_backend
from stillhouse_kernels.vocabulary_loss.settings import (
    Settings,
    Shaping,
    TeacherTopK,
    accumulation_dtype,
)
from stillhouse_kernels.vocabulary_loss.streaming import (
    TORCH_ROWS,
    Head,
    RowFunctions,
    loss_and_gradients,
)

TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.library.custom_op("stillhouse_kernels::linear_divergence", mutates_args=())
def linear_divergence_op(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    ids: Tensor | None,
    log_probs: Tensor | None,
    log_residual: Tensor | None,
    tail_ids: Tensor | None,
    tail_entropy: Tensor | None,
    mask: Tensor | None,
    divergence: str,
    weight: float,
    temperature: float,
    factor: float,
    student_scale: float,
    student_softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    chunk_size: int | None,
    backend: str,
    wants_hidden: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the loss, dX, dW and db; what is not wanted is empty.

    The dtypes are those that the products run in; under autocast they differ from the tensors'.
    """
    student = _head(student_hidden, student_weight, student_bias, student_dtype)
    if teacher_hidden is not None:
        assert teacher_weight is not None
        teacher = _head(teacher_hidden, teacher_weight, teacher_bias, teacher_dtype)
    else:
        assert ids is not None
        assert log_probs is not None
        assert log_residual is not None
        teacher = TeacherTopK(ids, log_probs, log_residual, tail_ids, tail_entropy)
    settings = Settings(
        divergence,
        weight,
        temperature,
        factor,
        Shaping(student_scale, student_softcap),
        Shaping(teacher_scale, teacher_softcap),
    )
    # Autocast has been applied already; it would round the float32 products again.
    with torch.autocast(student_hidden.device.type, enabled=False):
        loss, gradients = loss_and_gradients(
            student,
            teacher,
            mask,
            settings,
            wanted=(wants_hidden, wants_weight, wants_bias),
            chunk_size=chunk_size,
            rows=_rows(backend, student_hidden.device, student_dtype),
        )
    parameters = (student_hidden, student_weight, student_bias)
    kept = [
        student_hidden.new_empty(0) if g is None or p is None else g.to(_kept_dtype(p.dtype))
        for g, p in zip(gradients, parameters, strict=True)
    ]
    return loss, kept[0], kept[1], kept[2]


def _head(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Head:
    return Head(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def _kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of a gradient between the passes; float16 has no room for one that is divided by n."""
    return torch.float32 if dtype == torch.float16 else dtype


def _rows(backend: str, device: torch.device, dtype: torch.dtype) -> RowFunctions:
    refusal = None
    if dtype not in TRITON_DTYPES:
        name = str(dtype).removeprefix("torch.")
        refusal = f"the dtype is {name}, the kernel takes float32, float16 and bfloat16"
    if choose_backend(backend, device, triton_refuses=refusal) == "streaming":
        return TORCH_ROWS
    from stillhouse_kernels.vocabulary_loss.launch import triton_rows

    return triton_rows(dtype)


@linear_divergence_op.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student_dtype, wanted = rest[-7], rest[-3:]
    loss = student_hidden.new_empty((), dtype=accumulation_dtype(student_dtype))
    kept = [
        p.new_empty(p.shape, dtype=_kept_dtype(p.dtype))
        if want and p is not None
        else student_hidden.new_empty(0)
        for p, want in zip((student_hidden, student_weight, student_bias), wanted, strict=True)
    ]
    return loss, kept[0], kept[1], kept[2]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.dtypes = [None if p is None else p.dtype for p in inputs[:3]]
    ctx.wanted = inputs[-3:]
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros in the shape of dW for an output that has no gradient
    ctx.save_for_backward(*output[1:], *inputs[:3])


def _backward(ctx: Any, into_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    out: list[Tensor | None] = [None] * ctx.inputs
    if into_loss is None:
        return tuple(out)
    saved = ctx.saved_tensors  # asked for once, as checkpointing wants it
    kept, inputs = saved[:3], saved[3:]
    for i, (gradient, dtype) in enumerate(zip(kept, ctx.dtypes, strict=True)):
        if ctx.wanted[i]:
            out[i] = (gradient.detach() * into_loss.detach()).to(dtype)
    if torch.is_grad_enabled():
        out = [None if g is None else _Final.apply(g, into_loss, *inputs) for g in out]
    return tuple(out)


class _Final(torch.autograd.Function):
    """The identity, which refuses to be differentiated: silence would be a gradient of 0.

    It hangs on all that the gradient depends on, or a way to one of them alone would pass it by.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *depends_on: Tensor | None) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "linear_divergence has no second derivative: its gradients are made in the forward "
            "pass; backend='reference' has one"
        )


linear_divergence_op.register_autograd(_backward, setup_context=_setup_context)
