"""Triton kernels of shared attention, backward of a group of layers.

With S, P and O_l as in `forward_kernels`, where δ = Σ_l rowsum(dO_l ∘ O_l) = rowsum(P ∘ dP):

    dV_l = Pᵀ dO_l,   dP = Σ_l dO_l V_lᵀ,   dS = P ∘ (dP - δ),   dQ = scale dS K,   dK = scale dSᵀ Q

dP is summed over the group inside a tile, so P is rebuilt once for all its layers and no N x M
array exists. Every output has one writer (dQ a program a query block; dK and dV a program a key
block, which walks through the query heads that share it): no atomics, hence the same bits at every
run.
"""

import triton
import triton.language as tl

from stillhouse_kernels.shared_attention.forward_kernels import SIZES, load_base2_lse
from stillhouse_kernels.tiles import hide, load_tile, store_tile


@triton.jit(do_not_specialize=SIZES)
def value_backward(
    q_ptr,
    k_ptr,
    grad_out_ptr,
    mask_ptr,
    grad_v_ptr,
    lse_ptr,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    grad_out_batch_stride,
    grad_out_head_stride,
    grad_out_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    heads,
    k_group,
    v_group,
    queries,
    keys,
    head_dim,
    offset,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One key block of one value head: dV = Pᵀ dO over the query heads that read it."""
    blocks = tl.cdiv(keys, BLOCK_N)
    first_key = tl.program_id(0) % blocks * BLOCK_N
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    v_heads = heads // v_group
    batch = slot // v_heads
    q_ptr += batch * q_batch_stride
    k_ptr += batch * k_batch_stride
    grad_out_ptr += batch * grad_out_batch_stride
    mask_ptr += batch * mask_batch_stride

    key = first_key + tl.arange(0, BLOCK_N)
    grad_v_ND = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for member in range(0, v_group):
        head = slot % v_heads * v_group + member
        q_head = q_ptr + head * q_head_stride
        grad_out_head = grad_out_ptr + head * grad_out_head_stride
        k_head = k_ptr + head // k_group * k_head_stride
        k_ND = load_tile(k_head, key, k_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
        lse_head = lse_ptr + (batch * heads + head) * queries
        for first_query in range(
            tl.maximum(first_key - offset, 0) // BLOCK_M * BLOCK_M, queries, BLOCK_M
        ):
            query = first_query + tl.arange(0, BLOCK_M)
            q_MD = load_tile(q_head, query, q_row_stride, queries, head_dim, HEAD_DIM, UPCAST)
            grad_out_MD = load_tile(
                grad_out_head, query, grad_out_row_stride, queries, head_dim, HEAD_DIM, UPCAST
            )
            lse_M = load_base2_lse(lse_head, query, queries)
            s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * scale_log2
            partial = first_key + BLOCK_N > tl.minimum(first_query + offset + 1, keys)
            s_NM = hide(
                s_NM, query[None, :], key[:, None], queries, keys, offset, partial,
                mask_ptr + head * mask_head_stride, mask_row_stride, HAS_MASK,
            )  # fmt: skip
            p_NM = tl.exp2(s_NM - lse_M[None, :])
            grad_v_ND = tl.dot(
                p_NM.to(grad_out_MD.dtype), grad_out_MD, grad_v_ND, input_precision="ieee"
            )

    grad_v_ptr += slot * keys * head_dim
    store_tile(grad_v_ptr, grad_v_ND, key, keys, head_dim, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def score_backward_q(
    q_ptr,
    k_ptr,
    values_ptr,
    grad_outs_ptr,
    mask_ptr,
    grad_q_ptr,
    lse_ptr,
    delta_ptr,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    values_layer_stride,
    grad_outs_layer_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    layers,
    heads,
    k_group,
    v_group,
    queries,
    keys,
    head_dim,
    offset,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One query block of one head: dQ = scale dS K; values and dO are contiguous, layer first."""
    blocks = tl.cdiv(queries, BLOCK_M)
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    batch = slot // heads
    head = slot % heads
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head // k_group * k_head_stride
    values_ptr += (batch * (heads // v_group) + head // v_group) * keys * head_dim
    grad_outs_ptr += slot * queries * head_dim
    mask_ptr += batch * mask_batch_stride + head * mask_head_stride

    query = first_query + tl.arange(0, BLOCK_M)
    q_MD = load_tile(q_ptr, query, q_row_stride, queries, head_dim, HEAD_DIM, UPCAST)
    lse_M = load_base2_lse(lse_ptr + slot * queries, query, queries)
    delta_M = tl.load(delta_ptr + slot * queries + query, mask=query < queries, other=0.0)
    grad_q_MD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    seen_by_all = tl.minimum(first_query + offset + 1, keys)
    for first_key in range(0, tl.minimum(first_query + BLOCK_M + offset, keys), BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        grad_p_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        value_layer = values_ptr
        grad_out_layer = grad_outs_ptr
        for _ in range(0, layers):
            v_ND = load_tile(value_layer, key, head_dim, keys, head_dim, HEAD_DIM, UPCAST)
            grad_out_MD = load_tile(
                grad_out_layer, query, head_dim, queries, head_dim, HEAD_DIM, UPCAST
            )
            grad_p_MN = tl.dot(grad_out_MD, tl.trans(v_ND), grad_p_MN, input_precision="ieee")
            value_layer += values_layer_stride
            grad_out_layer += grad_outs_layer_stride
        k_ND = load_tile(k_ptr, key, k_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
        partial = first_key + BLOCK_N > seen_by_all
        s_MN = hide(
            s_MN, query[:, None], key[None, :], queries, keys, offset, partial,
            mask_ptr, mask_row_stride, HAS_MASK,
        )  # fmt: skip
        grad_s_MN = tl.exp2(s_MN - lse_M[:, None]) * (grad_p_MN - delta_M[:, None])
        grad_q_MD = tl.dot(grad_s_MN.to(k_ND.dtype), k_ND, grad_q_MD, input_precision="ieee")

    grad_q_ptr += slot * queries * head_dim
    store_tile(grad_q_ptr, grad_q_MD * scale, query, queries, head_dim, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def score_backward_k(
    q_ptr,
    k_ptr,
    values_ptr,
    grad_outs_ptr,
    mask_ptr,
    grad_k_ptr,
    lse_ptr,
    delta_ptr,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    values_layer_stride,
    grad_outs_layer_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    layers,
    heads,
    k_group,
    v_group,
    queries,
    keys,
    head_dim,
    offset,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One key block of one key head: dK = scale dSᵀ Q over the query heads that read it."""
    blocks = tl.cdiv(keys, BLOCK_N)
    first_key = tl.program_id(0) % blocks * BLOCK_N
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    k_heads = heads // k_group
    batch = slot // k_heads
    q_ptr += batch * q_batch_stride
    k_ptr += batch * k_batch_stride + slot % k_heads * k_head_stride
    values_ptr += batch * (heads // v_group) * keys * head_dim
    mask_ptr += batch * mask_batch_stride

    key = first_key + tl.arange(0, BLOCK_N)
    k_ND = load_tile(k_ptr, key, k_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
    grad_k_ND = tl.zeros([BLOCK_N, HEAD_DIM], tl.float32)
    for member in range(0, k_group):
        head = slot % k_heads * k_group + member
        row = (batch * heads + head) * queries
        for first_query in range(
            tl.maximum(first_key - offset, 0) // BLOCK_M * BLOCK_M, queries, BLOCK_M
        ):
            query = first_query + tl.arange(0, BLOCK_M)
            grad_p_NM = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            value_layer = values_ptr + head // v_group * keys * head_dim
            grad_out_layer = grad_outs_ptr + row * head_dim
            for _ in range(0, layers):
                v_ND = load_tile(value_layer, key, head_dim, keys, head_dim, HEAD_DIM, UPCAST)
                grad_out_MD = load_tile(
                    grad_out_layer, query, head_dim, queries, head_dim, HEAD_DIM, UPCAST
                )
                grad_p_NM = tl.dot(v_ND, tl.trans(grad_out_MD), grad_p_NM, input_precision="ieee")
                value_layer += values_layer_stride
                grad_out_layer += grad_outs_layer_stride
            q_MD = load_tile(
                q_ptr + head * q_head_stride,
                query,
                q_row_stride,
                queries,
                head_dim,
                HEAD_DIM,
                UPCAST,
            )
            lse_M = load_base2_lse(lse_ptr + row, query, queries)
            delta_M = tl.load(delta_ptr + row + query, mask=query < queries, other=0.0)
            s_NM = tl.dot(k_ND, tl.trans(q_MD), input_precision="ieee") * scale_log2
            partial = first_key + BLOCK_N > tl.minimum(first_query + offset + 1, keys)
            s_NM = hide(
                s_NM, query[None, :], key[:, None], queries, keys, offset, partial,
                mask_ptr + head * mask_head_stride, mask_row_stride, HAS_MASK,
            )  # fmt: skip
            grad_s_NM = tl.exp2(s_NM - lse_M[None, :]) * (grad_p_NM - delta_M[None, :])
            grad_k_ND = tl.dot(grad_s_NM.to(q_MD.dtype), q_MD, grad_k_ND, input_precision="ieee")

    grad_k_ptr += slot * keys * head_dim
    store_tile(grad_k_ptr, grad_k_ND * scale, key, keys, head_dim, HEAD_DIM)
