"""Triton kernels of ReLU linear attention: its sums over keys, then its rows; each with its kin.

    S = Kᵀ V,  z = Kᵀ 1                                          sum_keys, over a chunk of keys
    S' = K̇ᵀ V + Kᵀ V̇,  z' = K̇ᵀ 1
    O = Q S / n,  n = Q z + eps                                  apply_queries
    O' = (Q̇ S + Q S' - (Q̇ z + Q z') ∘ O) / n

What all values have in common would be rounded with S and subtracted again in O'. So S is taken
relative to a mean of the values, c = Σ_d S_d / Σ_d z_d, which changes neither result:

    S° = S - z cᵀ,  S'° = S' - z' cᵀ,  O = (Q S° + (Q z) c) / n,  O - c = (Q S° - eps c) / n
    O' = (Q̇ S° + Q S'° - (Q̇ z + Q z') ∘ (O - c)) / n

Backward, for the gradient G of O, with the weights p = Q ∘ z / n of the features, which lie between
0 and 1 as those of a softmax do, and the features' own gradients D = pᵀ G, r = pᵀ δ:

    A = G S°ᵀ,  δ = rowsum(G ∘ (O - c)) = (rowsum(Q ∘ A) - eps G c) / n
    dQ = (A - δ zᵀ) / n                                          query_gradients, D and r too
    dV = (K / z) D,  dK = (V Dᵀ - D c - r) / z                   key_gradients

S°, S'° and D are multiplied in the dtype of the tensors, divided by their largest entry, so that
float16 holds them; S, z, D, r and all other sums are in float32. Each program writes sums of its
own chunk of tokens, and torch adds those up: no atomics, hence the same bits at every run. They lie
in memory as [e + 1, d], Sᵀ above z and Dᵀ above r.

Where z is 0, no key has the feature: S, S' and D are 0 there, and 1 / z is read as 0.

Letters of a tile's name are its axes: M queries, N keys, D the head dim and E a block of the value
dim, padded. A tangent ends in _t before them.

Source: Sana, arXiv 2410.10629, equation 2.
"""

from collections.abc import Iterator
from itertools import product
from typing import Any

import triton
import triton.language as tl

from stillhouse_kernels.compilation import Compilation
from stillhouse_kernels.tiles import load_tile, store_tile

MAX_HEAD_DIM = 128
MIN_CAPABILITY = 80
# Of keys that are divided by their sum over the tokens, for float16 to hold them.
_GAIN = tl.constexpr(1024.0)

# One compiled kernel serves every length: 1 and multiples of 16 are not compiled apart.
_SIZES = ("heads", "group", "rows", "chunk")
PROGRAMS = 512  # that a launch should have, before chunks of tokens grow


@triton.jit
def _relu(tile):
    """relu, which keeps NaN."""
    return tl.maximum(tile, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tile.dtype)


@triton.jit
def _positive(condition, tile):
    """The tile where the condition is above 0, else 0."""
    return tl.where(condition > 0, tile, 0.0).to(tile.dtype)


@triton.jit
def _load_sums(pointer, row, rows, head_dim, HEAD_DIM: tl.constexpr):
    """Rows of Sᵀ or Dᵀ, and the row below it."""
    s_ED = load_tile(pointer, row, head_dim, rows, head_dim, HEAD_DIM, False)
    column = tl.arange(0, HEAD_DIM)
    z_D = tl.load(pointer + rows * head_dim + column, mask=column < head_dim, other=0.0)
    return s_ED, z_D


@triton.jit
def _store_sums(pointer, s_ED, z_D, row, rows, head_dim, HEAD_DIM: tl.constexpr):
    """Rows of Sᵀ or Dᵀ, and the row below it."""
    store_tile(pointer, s_ED, row, rows, head_dim, HEAD_DIM)
    column = tl.arange(0, HEAD_DIM)
    tl.store(pointer + rows * head_dim + column, z_D, mask=column < head_dim)


@triton.jit
def _store_columns(pointer, tile, row, rows, column, columns):
    """Rows and columns of a contiguous matrix [rows, columns]."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    address = pointer + row[:, None] * columns + column[None, :]
    tl.store(address, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _rows_product(q_MD, s_ED):
    """Q S [M, E] of Sᵀ; outside the matrix unit in slices of 32 columns, which registers hold."""
    if s_ED.dtype == tl.float32:
        q = tl.reshape(q_MD, [q_MD.shape[0], q_MD.shape[1] // 32, 32])
        s = tl.reshape(s_ED, [s_ED.shape[0], s_ED.shape[1] // 32, 32])
        sliced = tl.dot(tl.permute(q, [1, 0, 2]), tl.permute(s, [1, 2, 0]), input_precision="ieee")
        return tl.sum(sliced, 0)
    else:
        return tl.dot(q_MD, tl.trans(s_ED), input_precision="ieee")


@triton.jit
def _centre(s_ED, z_D):
    """What all values have in common: a mean of theirs."""
    return tl.sum(s_ED, 1) / tl.maximum(tl.sum(z_D, 0), 1e-37)


@triton.jit
def _scale(tile):
    """The largest magnitude; 1 where all is 0."""
    largest = tl.max(tl.max(tl.abs(tile), 1), 0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit(do_not_specialize=_SIZES)
def sum_keys(
    k_ptr,
    v_ptr,
    k_t_ptr,
    v_t_ptr,
    sums_ptr,
    sums_t_ptr,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
    k_t_batch_stride,
    k_t_head_stride,
    k_t_row_stride,
    v_t_batch_stride,
    v_t_head_stride,
    v_t_row_stride,
    heads,
    rows,
    chunk,
    head_dim,
    value_dim,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_TANGENT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One chunk of the keys of one head, one block of its values' columns: Sᵀ above z."""
    parts = tl.cdiv(value_dim, BLOCK_E)
    chunks = tl.cdiv(rows, chunk)
    first_column = tl.program_id(0) % parts * BLOCK_E
    place = (tl.program_id(0) // parts).to(tl.int64)
    slot = place // chunks
    start = (place % chunks).to(tl.int32) * chunk
    batch = slot // heads
    head = slot % heads
    k_ptr += batch * k_batch_stride + head * k_head_stride
    v_ptr += batch * v_batch_stride + head * v_head_stride + first_column
    k_t_ptr += batch * k_t_batch_stride + head * k_t_head_stride
    v_t_ptr += batch * v_t_batch_stride + head * v_t_head_stride + first_column
    columns = value_dim - first_column

    s_ED = tl.zeros([BLOCK_E, HEAD_DIM], tl.float32)
    s_t_ED = tl.zeros([BLOCK_E, HEAD_DIM], tl.float32)
    z_ND = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    z_t_ND = tl.zeros([BLOCK, HEAD_DIM], tl.float32)
    for first in range(start, tl.minimum(start + chunk, rows), BLOCK):
        key = first + tl.arange(0, BLOCK)
        k_ND = load_tile(k_ptr, key, k_row_stride, rows, head_dim, HEAD_DIM, UPCAST)
        v_NE = load_tile(v_ptr, key, v_row_stride, rows, columns, BLOCK_E, UPCAST)
        if HAS_TANGENT:
            k_t_ND = load_tile(k_t_ptr, key, k_t_row_stride, rows, head_dim, HEAD_DIM, UPCAST)
            v_t_NE = load_tile(v_t_ptr, key, v_t_row_stride, rows, columns, BLOCK_E, UPCAST)
            k_t_ND = _positive(k_ND, k_t_ND)
            s_t_ED = tl.dot(tl.trans(v_NE), k_t_ND, s_t_ED, input_precision="ieee")
            z_t_ND += k_t_ND.to(tl.float32)
        k_ND = _relu(k_ND)
        s_ED = tl.dot(tl.trans(v_NE), k_ND, s_ED, input_precision="ieee")
        z_ND += k_ND.to(tl.float32)
        if HAS_TANGENT:
            s_t_ED = tl.dot(tl.trans(v_t_NE), k_ND, s_t_ED, input_precision="ieee")

    # Every block of columns writes the same z.
    column = first_column + tl.arange(0, BLOCK_E)
    offset = place * (value_dim + 1) * head_dim
    z_D = tl.sum(z_ND, 0)
    _store_sums(sums_ptr + offset, s_ED, z_D, column, value_dim, head_dim, HEAD_DIM)
    if HAS_TANGENT:
        z_t_D = tl.sum(z_t_ND, 0)
        _store_sums(sums_t_ptr + offset, s_t_ED, z_t_D, column, value_dim, head_dim, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES)
def apply_queries(
    q_ptr,
    q_t_ptr,
    sums_ptr,
    sums_t_ptr,
    out_ptr,
    out_t_ptr,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    q_t_batch_stride,
    q_t_head_stride,
    q_t_row_stride,
    heads,
    group,
    rows,
    chunk,
    head_dim,
    value_dim,
    eps,
    HEAD_DIM: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_QUERY_TANGENT: tl.constexpr,
    HAS_KEY_TANGENT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One chunk of the queries of one head, one block of the values' columns: O and O'."""
    parts = tl.cdiv(value_dim, BLOCK_E)
    chunks = tl.cdiv(rows, chunk)
    column = tl.program_id(0) % parts * BLOCK_E + tl.arange(0, BLOCK_E)
    place = (tl.program_id(0) // parts).to(tl.int64)
    slot = place // chunks
    start = (place % chunks).to(tl.int32) * chunk
    batch = slot // heads
    head = slot % heads
    q_ptr += batch * q_batch_stride + head * q_head_stride
    q_t_ptr += batch * q_t_batch_stride + head * q_t_head_stride
    offset = (batch * (heads // group) + head // group) * (value_dim + 1) * head_dim
    out_ptr += slot * rows * value_dim
    out_t_ptr += slot * rows * value_dim

    operand: tl.constexpr = tl.float32 if UPCAST else q_ptr.dtype.element_ty
    s_ED, z_D = _load_sums(sums_ptr + offset, column, value_dim, head_dim, HEAD_DIM)
    centre_E = _centre(s_ED, z_D)
    s_ED -= centre_E[:, None] * z_D[None, :]
    scale = _scale(s_ED)
    s_ED = (s_ED / scale).to(operand)
    if HAS_KEY_TANGENT:
        s_t_ED, z_t_D = _load_sums(sums_t_ptr + offset, column, value_dim, head_dim, HEAD_DIM)
        s_t_ED -= centre_E[:, None] * z_t_D[None, :]
        scale_t = _scale(s_t_ED)
        s_t_ED = (s_t_ED / scale_t).to(operand)

    for first in range(start, tl.minimum(start + chunk, rows), BLOCK):
        query = first + tl.arange(0, BLOCK)
        q_MD = load_tile(q_ptr, query, q_row_stride, rows, head_dim, HEAD_DIM, UPCAST)
        total_t_M = tl.zeros([BLOCK], tl.float32)
        out_t_ME = tl.zeros([BLOCK, BLOCK_E], tl.float32)
        if HAS_QUERY_TANGENT:
            q_t_MD = load_tile(q_t_ptr, query, q_t_row_stride, rows, head_dim, HEAD_DIM, UPCAST)
            q_t_MD = _positive(q_MD, q_t_MD)
            total_t_M += tl.sum(q_t_MD.to(tl.float32) * z_D[None, :], 1)
            out_t_ME += _rows_product(q_t_MD, s_ED) * scale
        q_MD = _relu(q_MD)
        if HAS_KEY_TANGENT:
            total_t_M += tl.sum(q_MD.to(tl.float32) * z_t_D[None, :], 1)
            out_t_ME += _rows_product(q_MD, s_t_ED) * scale_t
        total_M = tl.sum(q_MD.to(tl.float32) * z_D[None, :], 1)
        inverse_M = 1.0 / (total_M + eps)
        out_ME = _rows_product(q_MD, s_ED) * scale
        if HAS_QUERY_TANGENT or HAS_KEY_TANGENT:
            apart_ME = (out_ME - eps * centre_E[None, :]) * inverse_M[:, None]
            out_t_ME = (out_t_ME - total_t_M[:, None] * apart_ME) * inverse_M[:, None]
            _store_columns(out_t_ptr, out_t_ME, query, rows, column, value_dim)
        out_ME = (out_ME + total_M[:, None] * centre_E[None, :]) * inverse_M[:, None]
        _store_columns(out_ptr, out_ME, query, rows, column, value_dim)


@triton.jit(do_not_specialize=_SIZES)
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
    s_ED, z_D = _load_sums(sums_ptr, column, value_dim, head_dim, HEAD_DIM)
    centre_E = _centre(s_ED, z_D)
    s_ED -= centre_E[:, None] * z_D[None, :]
    scale = _scale(s_ED)
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
        q_DM = tl.trans(_relu(q_MD)).to(tl.float32)
        inverse_M = 1.0 / (tl.sum(q_DM * z_D[:, None], 0) + eps)
        grad_q_DM = tl.dot(s_DE, tl.trans(grad_ME), input_precision="ieee") * scale
        delta_M = tl.sum(grad_ME.to(tl.float32) * centre_E[None, :], 1)
        delta_M = (tl.sum(q_DM * grad_q_DM, 0) - eps * delta_M) * inverse_M
        grad_q_DM = (grad_q_DM - delta_M[None, :] * z_D[:, None]) * inverse_M[None, :]
        grad_q_MD = tl.trans(_positive(q_DM, grad_q_DM))
        store_tile(grad_q_ptr, grad_q_MD, query, rows, head_dim, HEAD_DIM)
        p_DM = q_DM * z_D[:, None] * inverse_M[None, :]
        grad_z_D += tl.sum(p_DM * delta_M[None, :], 1)
        grad_s_DE = tl.dot(p_DM.to(operand), grad_ME, grad_s_DE, input_precision="ieee")
    grad_s_ED = tl.trans(grad_s_DE)
    grad_sums_ptr += place * size
    _store_sums(grad_sums_ptr, grad_s_ED, grad_z_D, column, value_dim, head_dim, HEAD_DIM)


@triton.jit(do_not_specialize=_SIZES)
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
    s_ED, z_D = _load_sums(sums_ptr + offset, column, value_dim, head_dim, HEAD_DIM)
    centre_E = _centre(s_ED, z_D)
    grad_s_ED, shift_D = _load_sums(grad_sums_ptr + offset, column, value_dim, head_dim, HEAD_DIM)
    scale = _scale(grad_s_ED)
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
        store_tile(grad_k_ptr, _positive(k_ND, grad_k_ND), key, rows, head_dim, HEAD_DIM)
        share_ND = _relu(k_ND).to(tl.float32) * inverse_D[None, :] * _GAIN
        grad_v_NE = tl.dot(share_ND.to(operand), tl.trans(grad_s_ED), input_precision="ieee")
        store_tile(grad_v_ptr, grad_v_NE * (scale / _GAIN), key, rows, value_dim, HEAD_DIM)


_KERNELS = (sum_keys, apply_queries, query_gradients, key_gradients)
_COLUMNS = {kernel.__name__: i for i, kernel in enumerate(_KERNELS)}

# The tangents that a launch is given; others are filled up with zeros.
PATTERNS: dict[str, dict[str, dict[str, bool]]] = {
    "sum_keys": {"primal": {"HAS_TANGENT": False}, "tangent": {"HAS_TANGENT": True}},
    "apply_queries": {
        "primal": {"HAS_QUERY_TANGENT": False, "HAS_KEY_TANGENT": False},
        "query": {"HAS_QUERY_TANGENT": True, "HAS_KEY_TANGENT": False},
        "tangent": {"HAS_QUERY_TANGENT": True, "HAS_KEY_TANGENT": True},
    },
}

# Chip, padded dim and bits of the dtype: (BLOCK_E, BLOCK, num_warps, num_stages) of the four
# kernels, of which the last two take all columns at once. The largest tiles that leave nothing in
# local memory. sm_80's fit into the 99 KiB of sm_86 and sm_89 too. Products in float32 run outside
# the matrix unit, from registers, hence the small tiles.
_TILES = {
    (80, 32, 16): ((32, 64, 4, 3), (32, 128, 4, 3), (32, 32, 4, 3), (32, 128, 4, 3)),
    (80, 32, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (80, 64, 16): ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3)),
    (80, 64, 32): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    (80, 128, 16): ((64, 64, 8, 3), (128, 32, 8, 2), (128, 16, 8, 2), (128, 64, 8, 2)),
    (80, 128, 32): ((64, 16, 8, 2), (64, 16, 8, 1), (128, 16, 8, 1), (128, 16, 8, 2)),
    (90, 32, 16): ((32, 64, 8, 3), (32, 128, 4, 3), (32, 32, 4, 3), (32, 128, 4, 3)),
    (90, 32, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (90, 64, 16): ((64, 64, 4, 3), (64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 4, 3)),
    (90, 64, 32): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 2)),
    (90, 128, 16): ((128, 32, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3)),
    (90, 128, 32): ((64, 16, 8, 2), (64, 16, 8, 1), (128, 16, 16, 1), (128, 16, 8, 2)),
    (100, 32, 16): ((32, 32, 4, 3), (32, 128, 4, 3), (32, 64, 4, 3), (32, 64, 4, 3)),
    (100, 32, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (100, 64, 16): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 8, 3)),
    (100, 64, 32): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 2)),
    (100, 128, 16): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    (100, 128, 32): ((64, 16, 8, 2), (64, 16, 8, 1), (128, 16, 16, 1), (128, 16, 8, 2)),
}
# Small, so that tensors of a test have several.
INTERPRETER_TILE = (32, 16, 4, 1)


def configuration(name: str, capability: int, width: int, bits: int) -> dict[str, int]:
    """Return the constexprs and options that a kernel is launched with.

    Args:
        name: the kernel's.
        capability: of the device, as 80 or 90; 0 is the interpreter. One that the table lacks takes
            the nearest lower chip's entry.
        width: the larger of head dim and value dim, at most `MAX_HEAD_DIM`.
        bits: of the tensors' dtype.
    """
    padded = next(w for w in (32, 64, MAX_HEAD_DIM) if width <= w)
    tile = INTERPRETER_TILE
    if capability:
        # sm_120 has sm_89's shared memory and no tensor memory.
        chip = 80 if capability >= 120 else max(c for c in (80, 90, 100) if c <= capability)
        tile = _TILES[chip, padded, bits][_COLUMNS[name]]
    names = ("BLOCK_E", "BLOCK", "num_warps", "num_stages")
    options = {"HEAD_DIM": padded, **dict(zip(names, tile, strict=True))}
    if name not in PATTERNS:
        del options["BLOCK_E"]
    return options


def chunk_rows(rows: int, slots: int, width: int, block: int, capability: int) -> int:
    """Return how many tokens a program walks through: a rule of sizes, so that sums repeat.

    Args:
        rows: tokens.
        slots: heads of the whole batch.
        width: padded width of a head; sums [width, width] are loaded or stored per chunk.
        block: tokens at a time.
        capability: 0 is the interpreter.
    """
    least = 8 * width if capability else 2 * block
    chunks = max(1, min(-(-rows // least), -(-PROGRAMS // slots)))
    return -(-rows // (chunks * block)) * block


def compilations(capability: int) -> Iterator[Compilation]:
    """Every specialisation that a launch on ordinary tensors can choose on a chip.

    Args:
        capability: compute capability as 80, 90 or 100.
    """
    dtypes = (("fp32", 32), ("fp16", 16), ("bf16", 16))
    for kernel, width, (dtype, bits) in product(_KERNELS, (32, 64, MAX_HEAD_DIM), dtypes):
        for pattern, tangents in PATTERNS.get(kernel.__name__, {"": {}}).items():
            constexprs: dict[str, Any] = configuration(kernel.__name__, capability, width, bits)
            num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
            constexprs |= tangents | {"UPCAST": False}
            arguments = [name for name in kernel.arg_names if name not in constexprs]
            yield Compilation(
                kernel=kernel,
                label=f"{pattern}{', ' if pattern else ''}head_dim {width}, {dtype}",
                signature={name: _triton_type(name, dtype) for name in arguments},
                constexprs=constexprs,
                num_warps=num_warps,
                num_stages=num_stages,
                divisible=tuple(n for n in arguments if n.endswith(("_stride", "_dim"))),
                matrix_product=bits == 16,
            )


def _triton_type(argument: str, dtype: str) -> str:
    if argument.endswith("_ptr"):
        return "*fp32" if "sums" in argument else f"*{dtype}"
    return "fp32" if argument == "eps" else "i32"
