"""Triton kernels of ReLU linear attention, backward.

With S, z, S°, O, n and c as in `forward_kernels`, for the gradient G of O, with the weights
p = Q ∘ z / n of the features, which lie between 0 and 1 as those of a softmax do, and the features'
own gradients D = pᵀ G, r = pᵀ δ:

    A = G S°ᵀ,  δ = rowsum(G ∘ (O - c)) = (rowsum(Q ∘ A) - eps G c) / n
    dQ = (A - δ zᵀ) / n                                          query_gradients, D and r too
    dV = (K / z) D,  dK = (V Dᵀ - D c - r) / z                   key_gradients

D and r are scaled, summed and stored as S and z are there.
"""

import triton
import triton.language as tl

from stillhouse_kernels.linear_attention.forward_kernels import (
    SIZES,
    centre,
    load_sums,
    positive,
    relu,
    scale_of,
    store_sums,
)
from stillhouse_kernels.tiles import load_tile, store_tile

# Of keys that are divided by their sum over the tokens, for float16 to hold them.
_GAIN = tl.constexpr(1024.0)


@triton.jit(do_not_specialize=SIZES)
def query_gradients(
    q_ptr,
    grad_out_ptr,
    sums_ptr,
    grad_q_ptr,
    grad_sums_ptr,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    grad_out_batch_stride,
    grad_out_head_stride,
    grad_out_row_stride,
    heads,
    group,
    rows,
    chunk,
    head_dim,
    value_dim,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One chunk of the queries of one head: dQ, and Dᵀ above r."""
    chunks = tl.cdiv(rows, chunk)
    place = tl.program_id(0).to(tl.int64)
    slot = place // chunks
    start = (place % chunks).to(tl.int32) * chunk
    batch = slot // heads
    head = slot % heads
    q_ptr += batch * q_batch_stride + head * q_head_stride
    grad_out_ptr += batch * grad_out_batch_stride + head * grad_out_head_stride
    grad_q_ptr += slot * rows * head_dim
    size = (value_dim + 1) * head_dim
    sums_ptr += (batch * (heads // group) + head // group) * size

    operand: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    column = tl.arange(0, HEAD_DIM)
    s_ED, z_D = load_sums(sums_ptr, column, value_dim, head_dim, HEAD_DIM)
    centre_E = centre(s_ED, z_D)
    s_ED -= centre_E[:, None] * z_D[None, :]
    scale = scale_of(s_ED)
    s_ED = (s_ED / scale).to(operand)
    # As [D, M] a product has a head's width of rows, and no warp repeats another's few tokens.
    s_DE = tl.trans(s_ED)
    grad_s_DE = tl.zeros([HEAD_DIM, HEAD_DIM], tl.float32)
    grad_z_D = tl.zeros([HEAD_DIM], tl.float32)
    for first in range(start, tl.minimum(start + chunk, rows), BLOCK):
        query = first + tl.arange(0, BLOCK)
        q_MD = load_tile(q_ptr, query, q_row_stride, rows, head_dim, HEAD_DIM, UPCAST)
        grad_ME = load_tile(
            grad_out_ptr, query, grad_out_row_stride, rows, value_dim, HEAD_DIM, UPCAST
        )
        q_DM = tl.trans(relu(q_MD)).to(tl.float32)
        inverse_M = 1.0 / (tl.sum(q_DM * z_D[:, None], 0) + eps)
        grad_q_DM = tl.dot(s_DE, tl.trans(grad_ME), input_precision="ieee") * scale
        delta_M = tl.sum(grad_ME.to(tl.float32) * centre_E[None, :], 1)
        delta_M = (tl.sum(q_DM * grad_q_DM, 0) - eps * delta_M) * inverse_M
        grad_q_DM = (grad_q_DM - delta_M[None, :] * z_D[:, None]) * inverse_M[None, :]
        grad_q_MD = tl.trans(positive(q_DM, grad_q_DM))
        store_tile(grad_q_ptr, grad_q_MD, query, rows, head_dim, HEAD_DIM)
        p_DM = q_DM * z_D[:, None] * inverse_M[None, :]
        grad_z_D += tl.sum(p_DM * delta_M[None, :], 1)
        grad_s_DE = tl.dot(p_DM.to(operand), grad_ME, grad_s_DE, input_precision="ieee")
    grad_s_ED = tl.trans(grad_s_DE)
    grad_sums_ptr += place * size
    store_sums(grad_sums_ptr, grad_s_ED, grad_z_D, column, value_dim, head_dim, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def key_gradients(
    k_ptr,
    v_ptr,
    sums_ptr,
    grad_sums_ptr,
    grad_k_ptr,
    grad_v_ptr,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    heads,
    rows,
    chunk,
    head_dim,
    value_dim,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One chunk of the keys of one head: dK and dV."""
    chunks = tl.cdiv(rows, chunk)
    place = tl.program_id(0).to(tl.int64)
    slot = place // chunks
    start = (place % chunks).to(tl.int32) * chunk
    batch = slot // heads
    head = slot % heads
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride
    grad_k_ptr += slot * rows * head_dim
    grad_v_ptr += slot * rows * value_dim
    offset = slot * (value_dim + 1) * head_dim

    operand: tl.constexpr = tl.float32 if UPCAST else k_ptr.dtype.element_ty
    column = tl.arange(0, HEAD_DIM)
    s_ED, z_D = load_sums(sums_ptr + offset, column, value_dim, head_dim, HEAD_DIM)
    centre_E = centre(s_ED, z_D)
    grad_s_ED, shift_D = load_sums(grad_sums_ptr + offset, column, value_dim, head_dim, HEAD_DIM)
    scale = scale_of(grad_s_ED)
    grad_s_ED = (grad_s_ED / scale).to(operand)
    # Of D as rounded: what V Dᵀ holds of c cancels.
    shift_D += tl.sum(grad_s_ED.to(tl.float32) * centre_E[:, None], 0) * scale
    inverse_D = tl.where(z_D > 0, 1.0 / tl.where(z_D > 0, z_D, 1.0), 0.0)
    for first in range(start, tl.minimum(start + chunk, rows), BLOCK):
        key = first + tl.arange(0, BLOCK)
        k_ND = load_tile(k_ptr, key, k_row_stride, rows, head_dim, HEAD_DIM, UPCAST)
        v_NE = load_tile(v_ptr, key, v_row_stride, rows, value_dim, HEAD_DIM, UPCAST)
        grad_k_ND = tl.dot(v_NE, grad_s_ED, input_precision="ieee") * scale
        grad_k_ND = (grad_k_ND - shift_D[None, :]) * inverse_D[None, :]
        store_tile(grad_k_ptr, positive(k_ND, grad_k_ND), key, rows, head_dim, HEAD_DIM)
        share_ND = relu(k_ND).to(tl.float32) * inverse_D[None, :] * _GAIN
        grad_v_NE = tl.dot(share_ND.to(operand), tl.trans(grad_s_ED), input_precision="ieee")
        store_tile(grad_v_ptr, grad_v_NE * (scale / _GAIN), key, rows, value_dim, HEAD_DIM)
