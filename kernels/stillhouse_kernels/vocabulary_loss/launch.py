"""Grids of the Triton kernels: a chunk's logits in, values and G out."""

from typing import Any

import torch
from torch import Tensor

from stillhouse_kernels.vocabulary_loss import kernel
from stillhouse_kernels.vocabulary_loss.settings import Settings, Shaping, TeacherTopK
from stillhouse_kernels.vocabulary_loss.streaming import RowFunctions
from stillhouse_kernels.vocabulary_loss.top_k import top_k_rows


def dense_rows(
    s: Tensor, t: Tensor, settings: Settings, dtype: torch.dtype, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return D(P, Q) [n] and G [n, V] in the given dtype, in the storage of s; t is only read.

    Args:
        s, t: the student's and the teacher's products [n, V], float32.
        settings: of the loss.
        dtype: that the gradient's products run in.
        gradient: whether G is wanted.
    """
    values = s.new_empty(s.shape[0])
    G = _in_place(s, dtype)
    student, teacher = settings.student, settings.teacher
    _run(
        kernel.dense_rows,
        s,
        (s, t, G, values, s.shape[1], s.stride(0), t.stride(0), G.stride(0)),
        (student.scale, teacher.scale, student.softcap or 0.0, teacher.softcap or 0.0),
        (settings.temperature, settings.weight, int(gradient)),
        DIVERGENCE=settings.divergence,
        CAPPED=student.softcap is not None or teacher.softcap is not None,
    )
    return values, G if gradient else None


def top_k_kernel_rows(
    s: Tensor, teacher: TeacherTopK, settings: Settings, dtype: torch.dtype, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The same against the teacher's top-k; the k + 1 symbols are worked out by torch."""

    def lse(logits: Tensor) -> Tensor:
        out = logits.new_empty(logits.shape[0])
        _run(kernel.tail_lse, logits, (logits, out, logits.shape[1], logits.stride(0)))
        return out

    def spread(logits: Tensor, lse: Tensor, into_tail: Tensor, shaping: Shaping) -> Tensor:
        G = _in_place(logits, dtype)
        pointers = (logits, lse, into_tail.contiguous(), G)
        sizes = (logits.shape[1], logits.stride(0), G.stride(0), shaping.softcap or 0.0)
        _run(kernel.spread_tail, logits, pointers, sizes)
        return G

    return top_k_rows(s, teacher, settings, gradient=gradient, tail_lse=lse, spread_tail=spread)


def triton_rows(dtype: torch.dtype) -> RowFunctions:
    """The kernels as row functions for heads that multiply in this dtype."""

    def dense(s: Tensor, t: Tensor, settings: Settings, *, gradient: bool) -> Any:
        return dense_rows(s, t, settings, dtype, gradient=gradient)

    def top_k(s: Tensor, teacher: TeacherTopK, settings: Settings, *, gradient: bool) -> Any:
        return top_k_kernel_rows(s, teacher, settings, dtype, gradient=gradient)

    return RowFunctions(dense, top_k)


def _in_place(s: Tensor, dtype: torch.dtype) -> Tensor:
    """The storage of s [n, V] as G's: of a 16-bit G the first half of every row."""
    return s if dtype == s.dtype else s.view(dtype)[:, : s.shape[1]]


def _run(function: Any, rows: Tensor, *arguments: tuple[Any, ...], **constexprs: Any) -> None:
    capability = None
    if rows.is_cuda:
        device = torch.cuda.get_device_properties(rows.device)
        capability = 10 * device.major + device.minor
    block, num_warps = kernel.configuration(capability)
    flat = [x for group in arguments for x in group]
    options = {"BLOCK": block, "num_warps": num_warps, "num_stages": 1, **constexprs}
    with torch.cuda.device_of(rows):
        function[(rows.shape[0],)](*flat, **options)
