"""Grids of the Triton kernels of attention and its tangent: tensors in, tensors out, no autograd.

The three functions have the signatures of `streaming`. The primal alone runs in the kernels of
shared attention, as a leader without followers.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from stillhouse_kernels.dispatch import interpreted
from stillhouse_kernels.launching import (
    DTYPES,
    aligned,
    compute_capability,
    mask_arguments,
    strides,
    trimmed,
)
from stillhouse_kernels.shared_attention import launch as leader
from stillhouse_kernels.shared_attention.forward_kernels import LOG2_E
from stillhouse_kernels.shared_attention.kernel import MAX_HEAD_DIM, MIN_CAPABILITY
from stillhouse_kernels.tangent_attention import kernel


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
        if width > MAX_HEAD_DIM:
            return f"the {name} dim is {width}, the kernel takes at most {MAX_HEAD_DIM}"
    capability, least = compute_capability(q), MIN_CAPABILITY
    if 0 < capability < least:
        return f"{q.device} has compute capability {capability / 10}, the kernel needs {least / 10}"
    return None


def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O = softmax(scale Q Kᵀ) V, its tangent Ȯ and lse.

    Args:
        q: queries [B, h, N, d].
        k: keys [B, h_kv, M, d].
        v: values [B, h_kv, M, e]; h_kv divides h.
        q_t, k_t, v_t: tangents of q, k and v, in their dtype and any layout; None is 0, and saves
            products where all but v_t, or all but q_t, are None.
        mask: None, or bool [B or 1, h or 1, N, M], True = attend.
        causal: query i sees key j when j <= i + M - N.
        scale: of the scores.

    Returns:
        O and Ȯ [B, h, N, e] in q's dtype; lse [B, h, N] in float32, -inf for a row that sees no
        key, whose O and Ȯ are 0.
    """
    value_dim = v.shape[-1]
    primals, tangents = [aligned(x) for x in (q, k, v)], (q_t, k_t, v_t)
    present = tuple(tangent is not None for tangent in tangents)
    pattern = next((name for name, has in kernel.PATTERNS.items() if has == present), "all")
    arguments = mask_arguments(q, mask)
    for name, primal, tangent, read in zip(
        ("q", "k", "v"), primals, tangents, kernel.PATTERNS[pattern], strict=True
    ):
        if tangent is not None:
            tangent = aligned(tangent)
        else:  # zeros that take no memory, or what is not read
            tangent = primal.new_zeros(primal.shape[-1]).expand_as(primal) if read else primal
        arguments |= {f"{name}_ptr": primal, **strides(name, primal)}
        arguments |= {f"{name}_t_ptr": tangent, **strides(f"{name}_t", tangent)}
    q, k, v = primals
    (_, heads, queries, head_dim), keys = q.shape, k.shape[2]
    shape = (*q.shape[:3], v.shape[3])
    out, out_t = (torch.empty(shape, dtype=q.dtype, device=q.device) for _ in range(2))
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments |= {
        "out_ptr": out,
        "out_t_ptr": out_t,
        "lse_ptr": lse,
        "heads": heads,
        "k_group": heads // k.shape[1],
        "v_group": heads // v.shape[1],
        "queries": queries,
        "keys": keys,
        "head_dim": head_dim,
        "value_dim": v.shape[3],
        "offset": keys - queries if causal else keys,
        "scale": float(scale),
        "scale_log2": scale * LOG2_E,
        "UPCAST": q.dtype == torch.bfloat16 and interpreted(),
    }
    _run(pattern, arguments, out)
    return trimmed(out, value_dim), trimmed(out_t, value_dim), lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return O [B, h, N, e] and lse [B, h, N]; arguments as in `jvp`."""
    value_dim = v.shape[-1]
    q, k, v = _of_one_width(q, k, v)
    out, lse, _ = leader.leader_forward(q, k, v, mask, causal, scale)
    return trimmed(out, value_dim), lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dQ, dK and dV of the primal, in the shapes of q, k and v.

    Args:
        q, k, v, mask, causal, scale: as in `jvp`.
        out, lse: what `jvp` or `forward` returned.
        grad_out: dO [B, h, N, e].
    """
    delta = (grad_out.float() * out.float()).sum(-1)
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    q, k, v, grad_out = _of_one_width(q, k, v, grad_out)
    nothing, rest = q.new_empty(0), (mask, causal, scale)
    grad_v = leader.value_backward(q, k, lse, nothing, grad_out, *rest, v.shape[1])
    grad_q, grad_k = leader.score_backward(q, k, lse, nothing, [v], [grad_out], delta, *rest)
    return trimmed(grad_q, head_dim), trimmed(grad_k, head_dim), trimmed(grad_v, value_dim)


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """The tensors with columns of zeros up to the widest; they change neither scores nor sums."""
    width = max(x.shape[-1] for x in tensors)
    return [F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in tensors]


def _run(pattern: str, arguments: dict[str, Any], out: Tensor) -> None:
    """Launch a program for each block of rows of O [B, h, N, e]."""
    batch, heads, queries, value_dim = out.shape
    width, bits = max(arguments["head_dim"], value_dim), 8 * out.dtype.itemsize
    options = kernel.configuration(pattern, compute_capability(out), width, bits)
    programs = batch * heads * triton.cdiv(queries, options["BLOCK_M"])
    function: Any = kernel.jvp_forward
    with torch.cuda.device_of(out):
        function[(programs,)](**arguments, **options)
