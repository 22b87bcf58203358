"""The token loop: logits of a chunk, values and G, the gradients added up; all in the forward pass.

What only differs between a CPU and a GPU is the function from a chunk's logits to values and G.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse_kernels.vocabulary_loss import products
from stillhouse_kernels.vocabulary_loss.arguments import check_ids
from stillhouse_kernels.vocabulary_loss.rows import dense_rows
from stillhouse_kernels.vocabulary_loss.settings import Settings, TeacherTopK, accumulation_dtype
from stillhouse_kernels.vocabulary_loss.top_k import (
    top_k_rows,
    torch_spread_tail,
    torch_tail_lse,
)

CPU_CHUNKS, GPU_CHUNK = (64, 384), 1024  # tokens
CPU_LOGITS_BYTES = 1 << 28  # of one model's logits and the other's together


class Head(NamedTuple):
    """Hidden states [n, H] and the layer that makes logits of them: weight [V, H], bias [V]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Gradients(NamedTuple):
    """dX [n, H], dW [V, H] and db [V]; None where it was not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class RowFunctions:
    """From a chunk's products to values [c] and G [c, V]; both may spoil what they are given.

    Attributes:
        dense: (student [c, V], teacher [c, V], settings, gradient=).
        top_k: (student [c, V], teacher, settings, gradient=).
    """

    dense: Callable[..., tuple[Tensor, Tensor | None]]
    top_k: Callable[..., tuple[Tensor, Tensor | None]]


def torch_top_k_rows(
    s: Tensor, teacher: TeacherTopK, settings: Settings, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """`top_k_rows` by torch alone."""
    tail = {"tail_lse": torch_tail_lse, "spread_tail": torch_spread_tail}
    return top_k_rows(s, teacher, settings, gradient=gradient, **tail)


TORCH_ROWS = RowFunctions(dense_rows, torch_top_k_rows)


def default_chunk(vocabulary: int, models: int, accumulator: torch.dtype, on_cpu: bool) -> int:
    """Tokens of a chunk: what keeps the products busy and the logits of `models` heads small."""
    if not on_cpu:
        return GPU_CHUNK
    least, most = CPU_CHUNKS
    return min(max(CPU_LOGITS_BYTES // (models * vocabulary * accumulator.itemsize), least), most)


def loss_and_gradients(
    student: Head,
    teacher: Head | TeacherTopK,
    mask: Tensor | None,
    settings: Settings,
    *,
    wanted: tuple[bool, bool, bool],
    chunk_size: int | None,
    rows: RowFunctions = TORCH_ROWS,
) -> tuple[Tensor, Gradients]:
    """Return the mean over the unmasked tokens and its gradients.

    Args:
        student: X [n, H], W [V, H], b [V] or None, all of one dtype.
        teacher: the same of the teacher, or its top-k.
        mask: bool [n]; the other rows are never read, and their dX is 0.
        settings: of the loss.
        wanted: whether dX, dW and db are.
        chunk_size: tokens; None for `default_chunk`.
        rows: what makes values and G of logits.

    Returns:
        The loss in float32 (float64); dX in X's dtype, dW and db in float32 (float64).
    """
    hidden, weight, _ = student
    accumulator = accumulation_dtype(hidden.dtype)
    kept = None if mask is None else mask.nonzero().squeeze(-1)
    count = hidden.shape[0] if kept is None else kept.shape[0]
    models = 1 if isinstance(teacher, TeacherTopK) else 2
    if chunk_size is None:
        on_cpu = hidden.device.type == "cpu"
        chunk_size = default_chunk(weight.shape[0], models, accumulator, on_cpu)
    into = _buffers(student, accumulator, wanted, whole=kept is None and count > 0)
    if not count:
        return hidden.new_zeros((), dtype=accumulator), into
    if isinstance(teacher, TeacherTopK):
        check_ids(teacher, kept, weight.shape[0])
    logits = _logits_buffer(hidden, (models, min(chunk_size, count), weight.shape[0]), accumulator)
    values = hidden.new_empty(count, dtype=accumulator)
    alpha = settings.factor * settings.student.scale / (settings.temperature * count)
    for start in range(0, count, chunk_size):
        block = slice(start, min(start + chunk_size, count))
        at = block if kept is None else kept[block]
        x, s = hidden[at], logits[0, : block.stop - start]
        products.logits_(s, x, weight, student.bias)
        if isinstance(teacher, TeacherTopK):
            values[block], G = rows.top_k(s, teacher.at(at), settings, gradient=any(wanted))
        else:
            t = logits[1, : block.stop - start]
            products.logits_(t, teacher.hidden[at], teacher.weight, teacher.bias)
            values[block], G = rows.dense(s, t, settings, gradient=any(wanted))
        if G is not None:
            _add_gradients(into, G, x, weight, at, alpha, first=start == 0)
    return settings.factor * values.mean(), into


def _add_gradients(
    into: Gradients,
    G: Tensor,
    x: Tensor,
    weight: Tensor,
    at: slice | Tensor,
    alpha: float,
    *,
    first: bool,
) -> None:
    """dX = alpha G W at the chunk's rows; dW += alpha Gᵀ X and db += alpha Σ G."""
    accumulator = accumulation_dtype(weight.dtype)
    if products.native(weight, accumulator):
        G = G.to(weight.dtype)
    if into.hidden is not None:
        dx = torch.empty_like(x, dtype=accumulator)
        products.hidden_gradient_(dx, G, weight, alpha)
        into.hidden[at] = dx.to(into.hidden.dtype)
    if into.weight is not None:
        products.weight_gradient_(into.weight, G, x, alpha, first=first)
    if into.bias is not None:
        into.bias.add_(G.sum(0, dtype=accumulator), alpha=alpha)


def _logits_buffer(like: Tensor, shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """[models, c, V]; on a GPU the rows begin at multiples of 16 entries, for wide loads."""
    *outer, vocabulary = shape
    padded = vocabulary if like.device.type == "cpu" else -(-vocabulary // 16) * 16
    return like.new_empty(*outer, padded, dtype=dtype)[..., :vocabulary]


def _buffers(
    student: Head, accumulator: torch.dtype, wanted: tuple[bool, bool, bool], *, whole: bool
) -> Gradients:
    """Where the gradients go; zero unless every row and so every entry will be written."""
    hidden, weight, _ = student
    # float16 has no room for G / n: it is kept wide until the incoming gradient has scaled it.
    kept = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    make = hidden.new_empty if whole else hidden.new_zeros
    return Gradients(
        make(hidden.shape, dtype=kept) if wanted[0] else None,
        make(weight.shape, dtype=accumulator) if wanted[1] else None,
        hidden.new_zeros(weight.shape[0], dtype=accumulator) if wanted[2] else None,
    )
