"""Triton kernels of ReLU linear attention, forward: sums over keys, then rows; tangents beside.

    S = Kᵀ V,  z = Kᵀ 1                                          sum_keys, over a chunk of keys
    S' = K̇ᵀ V + Kᵀ V̇,  z' = K̇ᵀ 1
    O = Q S / n,  n = Q z + eps                                  apply_queries
    O' = (Q̇ S + Q S' - (Q̇ z + Q z') ∘ O) / n

What all values have in common would be rounded with S and subtracted again in O'. So S is taken
relative to a mean of the values, c = Σ_d S_d / Σ_d z_d, which changes neither result:

    S° = S - z cᵀ,  S'° = S' - z' cᵀ,  O = (Q S° + (Q z) c) / n,  O - c = (Q S° - eps c) / n
    O' = (Q̇ S° + Q S'° - (Q̇ z + Q z') ∘ (O - c)) / n

S°, S'° and D are multiplied in the dtype of the tensors, divided by their largest entry, so that
float16 holds them; S, z, D, r and all other sums are in float32. Each program writes sums of its
own chunk of tokens, and torch adds those up: no atomics, hence the same bits at every run. They lie
in memory as [e + 1, d], Sᵀ above z and Dᵀ above r.

Where z is 0, no key has the feature: S, S' and D are 0 there, and 1 / z is read as 0.

Letters of a tile's name are its axes: M queries, N keys, D the head dim and E a block of the value
dim, padded. A tangent ends in _t before them.

Source: Sana, arXiv 2410.10629, equation 2.
"""

import triton
import triton.language as tl

from stillhouse_kernels.tiles import load_tile, store_tile

# One compiled kernel serves every length: 1 and multiples of 16 are not compiled apart.
SIZES = ("heads", "group", "rows", "chunk")


@triton.jit
def relu(tile):
    """relu, which keeps NaN."""
    return tl.maximum(tile, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tile.dtype)


@triton.jit
def positive(condition, tile):
    """The tile where the condition is above 0, else 0."""
    return tl.where(condition > 0, tile, 0.0).to(tile.dtype)


@triton.jit
def load_sums(pointer, row, rows, head_dim, HEAD_DIM: tl.constexpr):
    """Rows of Sᵀ or Dᵀ, and the row below it."""
    s_ED = load_tile(pointer, row, head_dim, rows, head_dim, HEAD_DIM, False)
    column = tl.arange(0, HEAD_DIM)
    z_D = tl.load(pointer + rows * head_dim + column, mask=column < head_dim, other=0.0)
    return s_ED, z_D


@triton.jit
def store_sums(pointer, s_ED, z_D, row, rows, head_dim, HEAD_DIM: tl.constexpr):
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
def centre(s_ED, z_D):
    """What all values have in common: a mean of theirs."""
    return tl.sum(s_ED, 1) / tl.maximum(tl.sum(z_D, 0), 1e-37)


@triton.jit
def scale_of(tile):
    """The largest magnitude; 1 where all is 0."""
    largest = tl.max(tl.max(tl.abs(tile), 1), 0)
    return tl.where(largest > 0, largest, 1.0)


@triton.jit(do_not_specialize=SIZES)
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
            k_t_ND = positive(k_ND, k_t_ND)
            s_t_ED = tl.dot(tl.trans(v_NE), k_t_ND, s_t_ED, input_precision="ieee")
            z_t_ND += k_t_ND.to(tl.float32)
        k_ND = relu(k_ND)
        s_ED = tl.dot(tl.trans(v_NE), k_ND, s_ED, input_precision="ieee")
        z_ND += k_ND.to(tl.float32)
        if HAS_TANGENT:
            s_t_ED = tl.dot(tl.trans(v_t_NE), k_ND, s_t_ED, input_precision="ieee")

    # Every block of columns writes the same z.
    column = first_column + tl.arange(0, BLOCK_E)
    offset = place * (value_dim + 1) * head_dim
    z_D = tl.sum(z_ND, 0)
    store_sums(sums_ptr + offset, s_ED, z_D, column, value_dim, head_dim, HEAD_DIM)
    if HAS_TANGENT:
        z_t_D = tl.sum(z_t_ND, 0)
        store_sums(sums_t_ptr + offset, s_t_ED, z_t_D, column, value_dim, head_dim, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
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
    s_ED, z_D = load_sums(sums_ptr + offset, column, value_dim, head_dim, HEAD_DIM)
    centre_E = centre(s_ED, z_D)
    s_ED -= centre_E[:, None] * z_D[None, :]
    scale = scale_of(s_ED)
    s_ED = (s_ED / scale).to(operand)
    if HAS_KEY_TANGENT:
        s_t_ED, z_t_D = load_sums(sums_t_ptr + offset, column, value_dim, head_dim, HEAD_DIM)
        s_t_ED -= centre_E[:, None] * z_t_D[None, :]
        scale_t = scale_of(s_t_ED)
        s_t_ED = (s_t_ED / scale_t).to(operand)

    for first in range(start, tl.minimum(start + chunk, rows), BLOCK):
        query = first + tl.arange(0, BLOCK)
        q_MD = load_tile(q_ptr, query, q_row_stride, rows, head_dim, HEAD_DIM, UPCAST)
        total_t_M = tl.zeros([BLOCK], tl.float32)
        out_t_ME = tl.zeros([BLOCK, BLOCK_E], tl.float32)
        if HAS_QUERY_TANGENT:
            q_t_MD = load_tile(q_t_ptr, query, q_t_row_stride, rows, head_dim, HEAD_DIM, UPCAST)
            q_t_MD = positive(q_MD, q_t_MD)
            total_t_M += tl.sum(q_t_MD.to(tl.float32) * z_D[None, :], 1)
            out_t_ME += _rows_product(q_t_MD, s_ED) * scale
        q_MD = relu(q_MD)
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
