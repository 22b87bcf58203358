"""Grids of the Triton kernels of ReLU linear attention: tensors in, tensors out, no autograd.

The three functions have the signatures of `streaming`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse_kernels.dispatch import interpreted
from stillhouse_kernels.launching import DTYPES, aligned, compute_capability, strides, trimmed
from stillhouse_kernels.linear_attention import kernel


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return which limit of the kernels the inputs exceed, or None.

    Args:
        q: queries [B, h, N, d].
        k: keys [B, h_kv, M, d].
        v: values [B, h_kv, M, e].
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"the dtype of {name} is {dtype}, the kernel takes {known}"
    for name, width in (("head", q.shape[-1]), ("value", v.shape[-1])):
        if width > kernel.MAX_HEAD_DIM:
            limit = kernel.MAX_HEAD_DIM
            return f"the {name} dim is {width}, the kernel takes at most {limit}"
    capability, least = compute_capability(q), kernel.MIN_CAPABILITY
    if 0 < capability < least:
        return f"{q.device} has compute capability {capability / 10}, the kernel needs {least / 10}"
    return None


def forward(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return O = Q S / (Q z + eps) and the sums over the keys.

    Args:
        q: queries [B, h, N, d].
        k: keys [B, h_kv, M, d]; h_kv divides h.
        v: values [B, h_kv, M, e].
        eps: added to the denominator.

    Returns:
        O [B, h, N, e] in q's dtype; [V 1]ᵀ K [B, h_kv, e + 1, d] in float32.
    """
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    q, k, v = aligned(q), aligned(k), aligned(v)
    sums, _ = _sum_keys(k, v, None, None)
    out, _ = _apply(q, None, v, sums, None, eps)
    return trimmed(out, value_dim), _narrowed(sums, head_dim, value_dim)


def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O, its tangent, in q's dtype too, and the sums over the keys.

    Args:
        q, k, v, eps: as in `forward`.
        q_t, k_t, v_t: tangents of q, k and v, in their dtype and any layout, not all of them None;
            None is 0, and saves products where k_t and v_t both are.
    """
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    q, k, v = aligned(q), aligned(k), aligned(v)
    varied = k_t is not None or v_t is not None
    of_keys = (_filled(k, k_t), _filled(v, v_t)) if varied else (None, None)
    sums, sums_t = _sum_keys(k, v, *of_keys)
    out, out_t = _apply(q, q_t, v, sums, sums_t, eps)
    assert out_t is not None
    sums = _narrowed(sums, head_dim, value_dim)
    return trimmed(out, value_dim), trimmed(out_t, value_dim), sums


def backward(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, grad_out: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of the primal, in the shapes of q, k and v.

    Args:
        q, k, v, eps: as in `forward`.
        sums: what `forward` or `jvp` returned.
        grad_out: dO [B, h, N, e].
    """
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    q, k, v, grad_out = (aligned(t) for t in (q, k, v, grad_out))
    sums, shape = _widened(sums, v, k), (v.shape[-1] + 1, k.shape[-1])
    grad_q, grad_k, grad_v = (_empty(t, *t.shape, dtype=t.dtype) for t in (q, k, v))

    group = q.shape[1] // k.shape[1]
    plan = _plan(kernel.query_gradients, q, v)
    partial = _empty(q, *q.shape[:2], plan.chunks, *shape)
    arguments = _arguments(plan, q, v.shape[-1], {"q": q, "grad_out": grad_out})
    arguments |= {"sums_ptr": sums, "grad_q_ptr": grad_q, "grad_sums_ptr": partial}
    _run(plan, arguments | {"group": group, "eps": eps})
    grad_sums = partial.unflatten(1, (-1, group)).sum((2, 3))

    plan = _plan(kernel.key_gradients, k, v)
    arguments = _arguments(plan, k, v.shape[-1], {"k": k, "v": v})
    arguments |= {"sums_ptr": sums, "grad_sums_ptr": grad_sums}
    _run(plan, arguments | {"grad_k_ptr": grad_k, "grad_v_ptr": grad_v})
    return trimmed(grad_q, head_dim), trimmed(grad_k, head_dim), trimmed(grad_v, value_dim)


def _sum_keys(
    k: Tensor, v: Tensor, k_t: Tensor | None, v_t: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return [V 1]ᵀ K [B, g, e + 1, d] and its tangent, for aligned tensors, both tangents or none.

    Where both are None, so is the tangent of the sums.
    """
    tangential = k_t is not None and v_t is not None
    plan = _plan(kernel.sum_keys, k, v)
    shape = (*k.shape[:2], plan.chunks, v.shape[-1] + 1, k.shape[-1])
    partial = _empty(k, 1 + tangential, *shape)
    read = {"k": k, "v": v, "k_t": k if k_t is None else k_t, "v_t": v if v_t is None else v_t}
    arguments = _arguments(plan, k, v.shape[-1], read)
    arguments |= {"sums_ptr": partial[0], "sums_t_ptr": partial[-1]}
    _run(plan, arguments | kernel.PATTERNS["sum_keys"]["tangent" if tangential else "primal"])
    sums, *of_tangents = partial.sum(3) if plan.chunks > 1 else partial.squeeze(3)
    return sums, of_tangents[0] if tangential else None


def _apply(
    q: Tensor, q_t: Tensor | None, v: Tensor, sums: Tensor, sums_t: Tensor | None, eps: float
) -> tuple[Tensor, Tensor | None]:
    """Return O [B, h, N, e] and its tangent, which is None where both tangents are."""
    pattern = "tangent" if sums_t is not None else "primal" if q_t is None else "query"
    plan = _plan(kernel.apply_queries, q, v)
    out = _empty(q, *q.shape[:3], v.shape[-1], dtype=q.dtype)
    out_t = None if pattern == "primal" else _empty(q, *out.shape, dtype=q.dtype)
    read = {"q": q, "q_t": q if pattern == "primal" else _filled(q, q_t)}
    arguments = _arguments(plan, q, v.shape[-1], read)
    arguments |= {
        "sums_ptr": sums,
        "sums_t_ptr": sums if sums_t is None else sums_t,
        "out_ptr": out,
        "out_t_ptr": out if out_t is None else out_t,
        "group": q.shape[1] // sums.shape[1],
        "eps": eps,
    }
    _run(plan, arguments | kernel.PATTERNS["apply_queries"][pattern])
    return out, out_t


class _Plan(NamedTuple):
    """How a kernel walks over the tokens of [B, heads, tokens, d].

    Attributes:
        function: the kernel.
        chunk: tokens of a program.
        chunks: programs of a head, for every block of the values' columns.
        programs: of the launch.
        options: constexprs and the compiler's.
    """

    function: Any
    chunk: int
    chunks: int
    programs: int
    options: dict[str, int]


def _plan(function: Any, walked: Tensor, v: Tensor) -> _Plan:
    batch, heads, rows, head_dim = walked.shape
    capability, value_dim = compute_capability(walked), v.shape[-1]
    width, bits = max(head_dim, value_dim), 8 * walked.dtype.itemsize
    options = kernel.configuration(function.__name__, capability, width, bits)
    slots, padded, block = batch * heads, options["HEAD_DIM"], options["BLOCK"]
    chunk = kernel.chunk_rows(rows, slots, padded, block, capability)
    chunks = -(-rows // chunk)
    parts = -(-value_dim // options.get("BLOCK_E", padded))
    return _Plan(function, chunk, chunks, slots * chunks * parts, options)


def _arguments(
    plan: _Plan, walked: Tensor, value_dim: int, read: dict[str, Tensor]
) -> dict[str, Any]:
    """What every kernel is given, for the aligned tensors that it walks over and reads."""
    _, heads, rows, head_dim = walked.shape
    arguments: dict[str, Any] = {
        "heads": heads,
        "rows": rows,
        "chunk": plan.chunk,
        "head_dim": head_dim,
        "value_dim": value_dim,
        "UPCAST": walked.dtype == torch.bfloat16 and interpreted(),
    }
    for name, tensor in read.items():
        arguments |= {f"{name}_ptr": tensor, **strides(name, tensor)}
    return arguments


def _run(plan: _Plan, arguments: dict[str, Any]) -> None:
    with torch.cuda.device_of(arguments["sums_ptr"]):
        plan.function[(plan.programs,)](**arguments, **plan.options)


def _empty(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _filled(primal: Tensor, tangent: Tensor | None) -> Tensor:
    """The tangent as the kernels read it; where it is None, zeros that take no memory."""
    if tangent is None:
        return primal.new_zeros(primal.shape[-1:]).expand(primal.shape)
    return aligned(tangent)


def _narrowed(sums: Tensor, head_dim: int, value_dim: int) -> Tensor:
    """The sums [B, g, e + 1, d] without the rows and columns that padding gave them."""
    if sums.shape[2:] == (value_dim + 1, head_dim):
        return sums
    return torch.cat([sums[:, :, :value_dim], sums[:, :, -1:]], 2)[..., :head_dim].contiguous()


def _widened(sums: Tensor, v: Tensor, k: Tensor) -> Tensor:
    """The sums with the rows and columns of zeros that aligned values and keys give them."""
    columns, rows = k.shape[-1] - sums.shape[3], v.shape[-1] + 1 - sums.shape[2]
    if not (columns or rows):
        return sums.contiguous()
    S, z = F.pad(sums, (0, columns)).split([sums.shape[2] - 1, 1], 2)
    return torch.cat([F.pad(S, (0, 0, 0, rows)), z], 2)
