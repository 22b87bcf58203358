"""Grids of the Triton kernels of shared attention: tensors in, tensors out, no autograd.

The four functions have the signatures of `streaming`; here nothing of A is kept, and
`probabilities` is an empty tensor.
"""

from __future__ import annotations

import math
from typing import Any

import torch
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
from stillhouse_kernels.shared_attention import kernel
from stillhouse_kernels.shared_attention.forward_kernels import LOG2_E


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Return which limit of the kernels the inputs exceed, or None.

    Args:
        q: queries [B, h, N, d].
        k: keys [B, h_kv, M, d].
        v: values [B, h_kv', M, d_v].
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in DTYPES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"the dtype of {name} is {dtype}, the kernel takes {known}"
    if q.shape[-1] > kernel.MAX_HEAD_DIM:
        limit = kernel.MAX_HEAD_DIM
        return f"the head dim is {q.shape[-1]}, the kernel takes at most {limit}"
    if v.shape[-1] != q.shape[-1]:
        return (
            f"the value dim is {v.shape[-1]} and the head dim {q.shape[-1]}, "
            "the kernel takes equal ones"
        )
    capability, least = compute_capability(q), kernel.MIN_CAPABILITY
    if 0 < capability < least:
        return f"{q.device} has compute capability {capability / 10}, the kernel needs {least / 10}"
    return None


def leader_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O = softmax(scale Q Kᵀ) V, lse and what is kept of A: nothing.

    Args:
        q: queries [B, h, N, d].
        k: keys [B, h_kv, M, d].
        v: values [B, h_kv', M, d]; both head counts divide h.
        mask: None, or bool [B or 1, h or 1, N, M], True = attend.
        causal: query i sees key j when j <= i + M - N.
        scale: of the scores.

    Returns:
        O [B, h, N, d] in q's dtype; lse [B, h, N] in float32, -inf for a row that sees no key,
        whose O is 0; an empty tensor.
    """
    head_dim = q.shape[-1]
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
    arguments = _arguments(q, k, lse, mask, causal, scale, v.shape[1])
    arguments |= {"v_ptr": v, **strides("v", v), "out_ptr": out}
    _run(kernel.leader_forward, arguments, out, "BLOCK_M")
    return trimmed(out, head_dim), lse, q.new_empty(0)


def follower_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Return O = P V [B, h, N, d] with P = exp(scale Q Kᵀ - lse).

    Args:
        q, k, mask, causal, scale: the leader's.
        v: this layer's values [B, h_kv', M, d]; h_kv' divides h.
        lse: the leader's [B, h, N].
        probabilities: empty.
    """
    head_dim = q.shape[-1]
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arguments = _arguments(q, k, lse, mask, causal, scale, v.shape[1])
    arguments |= {"v_ptr": v, **strides("v", v), "out_ptr": out}
    _run(kernel.follower_forward, arguments, out, "BLOCK_M")
    return trimmed(out, head_dim)


def value_backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    grad_out: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    kv_heads: int,
) -> Tensor:
    """Return dV = Pᵀ dO [B, kv_heads, M, d], summed over the query heads of a group.

    Args:
        q, k, mask, causal, scale: the leader's.
        lse: the leader's [B, h, N].
        probabilities: empty.
        grad_out: dO [B, h, N, d].
        kv_heads: heads of the layer's values; divides h.
    """
    head_dim = q.shape[-1]
    q, k, grad_out = aligned(q), aligned(k), aligned(grad_out)
    batch, _, keys, padded = k.shape
    grad_v = torch.empty((batch, kv_heads, keys, padded), dtype=q.dtype, device=q.device)
    arguments = _arguments(q, k, lse, mask, causal, scale, kv_heads)
    arguments |= {
        "grad_out_ptr": grad_out,
        **strides("grad_out", grad_out),
        "grad_v_ptr": grad_v,
    }
    _run(kernel.value_backward, arguments, grad_v, "BLOCK_N")
    return trimmed(grad_v, head_dim)


def score_backward(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    probabilities: Tensor,
    values: list[Tensor],
    grad_outs: list[Tensor],
    delta: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Return dQ [B, h, N, d] and dK [B, h_kv, M, d] of a whole group of layers.

    Args:
        q, k, mask, causal, scale: the leader's.
        lse: the leader's [B, h, N].
        probabilities: empty.
        values: V_l [B, h_l, M, d] of each layer; h_l divides h.
        grad_outs: dO_l [B, h, N, d] of each layer.
        delta: Σ_l rowsum(dO_l ∘ O_l) [B, h, N].
    """
    # The heads that two layers' values share are those of the finer of their groupings.
    value_heads = math.lcm(*(v.shape[1] for v in values))
    stacked_values = torch.stack([_with_heads(aligned(v), value_heads) for v in values])
    stacked_grad_outs = torch.stack([aligned(grad_out).contiguous() for grad_out in grad_outs])
    head_dim = q.shape[-1]
    q, k = aligned(q), aligned(k)
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    arguments = _arguments(q, k, lse, mask, causal, scale, value_heads) | {
        "values_ptr": stacked_values,
        "grad_outs_ptr": stacked_grad_outs,
        "values_layer_stride": stacked_values.stride(0),
        "grad_outs_layer_stride": stacked_grad_outs.stride(0),
        "layers": len(values),
        "delta_ptr": delta.to(torch.float32).contiguous(),
        "scale": float(scale),
    }
    _run(kernel.score_backward_q, arguments | {"grad_q_ptr": grad_q}, grad_q, "BLOCK_M")
    _run(kernel.score_backward_k, arguments | {"grad_k_ptr": grad_k}, grad_k, "BLOCK_N")
    return trimmed(grad_q, head_dim), trimmed(grad_k, head_dim)


def _with_heads(v: Tensor, heads: int) -> Tensor:
    """Repeat heads [B, h_l, M, d] until there are `heads` of them, contiguous in memory."""
    repeats = heads // v.shape[1]
    return v.contiguous() if repeats == 1 else v.repeat_interleave(repeats, 1)


def _arguments(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    value_heads: int,
) -> dict[str, Any]:
    """What every kernel is given; q and k are aligned."""
    _, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    return {
        "q_ptr": q,
        "k_ptr": k,
        "lse_ptr": lse.contiguous(),
        **strides("q", q),
        **strides("k", k),
        **mask_arguments(q, mask),
        "heads": heads,
        "k_group": heads // k.shape[1],
        "v_group": heads // value_heads,
        "queries": queries,
        "keys": keys,
        "head_dim": head_dim,
        "offset": keys - queries if causal else keys,
        "scale_log2": scale * LOG2_E,
        "UPCAST": q.dtype == torch.bfloat16 and interpreted(),
    }


def _run(function: Any, arguments: dict[str, Any], written: Tensor, block: str) -> None:
    """Launch a program for each block of rows of the tensor [B, heads, rows, d] that it writes."""
    batch, heads, rows, head_dim = written.shape
    options = kernel.configuration(
        function.__name__, compute_capability(written), head_dim, 8 * written.dtype.itemsize
    )
    programs = batch * heads * triton.cdiv(rows, options[block])
    with torch.cuda.device_of(written):
        function[(programs,)](**arguments, **options)
