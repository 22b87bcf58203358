"""Triton kernels of shared attention, forward: of a leader, and of any number of followers.

    S = scale Q Kᵀ,    P = exp(S - lse) row by row,    O_l = P V_l

Leader, over the key blocks j (m and l are the running row maximum and row sum):

    m' = max(m, rowmax S_j),  p = exp(S_j - m'),  l' = e^(m - m') l + rowsum p,
    O' = e^(m - m') O + p V_j;    at the end  O / l  and  lse = m + log l

Follower: with lse known, exp(S_j - lse) is final at once. There is no running state, and blocks add
up in any order.

Exponentials are in base 2, with log2(e) folded into the scale; lse is a natural logarithm. A row
that sees no key has l = 0: it gets O = 0 and lse = -inf, and where P is rebuilt -inf is read as
+inf, so that P = 0. Query i sees key j when j <= i + offset; the offset is M - N for causal
attention, aligned bottom-right, and M where every key is visible.

Letters of a tile's name are its axes: M queries, N keys, D the head dim, padded to 64 or 128.

Sources: FlashAttention-2, arXiv 2307.08691 (the recurrence); EchoAtt, arXiv 2409.14595 (sharing).
"""

import triton
import triton.language as tl

from stillhouse_kernels.tiles import hide, load_tile, store_tile

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)

# One compiled kernel serves every length: 1 and multiples of 16 are not compiled apart.
SIZES = ("layers", "heads", "k_group", "v_group", "queries", "keys", "offset")


@triton.jit
def load_base2_lse(pointer, query, queries):
    """lse in base 2; +inf for rows that see no key or do not exist, so that exp2(S - lse) is 0."""
    lse = tl.load(pointer + query, mask=query < queries, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)


@triton.jit(do_not_specialize=SIZES)
def leader_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
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
    """One query block of one head: O and lse."""
    blocks = tl.cdiv(queries, BLOCK_M)
    # Under a causal mask the last block is the longest: it starts first.
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    batch = slot // heads
    head = slot % heads
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head // k_group * k_head_stride
    v_ptr += batch * v_batch_stride + head // v_group * v_head_stride
    mask_ptr += batch * mask_batch_stride + head * mask_head_stride

    query = first_query + tl.arange(0, BLOCK_M)
    q_MD = load_tile(q_ptr, query, q_row_stride, queries, head_dim, HEAD_DIM, UPCAST)
    maximum_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    out_MD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    seen_by_all = tl.minimum(first_query + offset + 1, keys)
    for first_key in range(0, tl.minimum(first_query + BLOCK_M + offset, keys), BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_ptr, key, k_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
        v_ND = load_tile(v_ptr, key, v_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
        partial = first_key + BLOCK_N > seen_by_all
        s_MN = hide(
            s_MN, query[:, None], key[None, :], queries, keys, offset, partial,
            mask_ptr, mask_row_stride, HAS_MASK,
        )  # fmt: skip
        maximum_new_M = tl.maximum(maximum_M, tl.max(s_MN, 1))
        # A row that has seen no key yet would subtract -inf from -inf.
        finite_M = tl.where(maximum_new_M == float("-inf"), 0.0, maximum_new_M)
        p_MN = tl.exp2(s_MN - finite_M[:, None])
        decay_M = tl.exp2(maximum_M - finite_M)
        sum_M = sum_M * decay_M + tl.sum(p_MN, 1)
        out_MD = tl.dot(
            p_MN.to(v_ND.dtype), v_ND, out_MD * decay_M[:, None], input_precision="ieee"
        )
        maximum_M = maximum_new_M

    seen_M = sum_M > 0.0
    sum_M = tl.where(seen_M, sum_M, 1.0)
    lse_M = tl.where(seen_M, (maximum_M + tl.log2(sum_M)) * LN_2, float("-inf"))
    tl.store(lse_ptr + slot * queries + query, lse_M, mask=query < queries)
    out_ptr += slot * queries * head_dim
    store_tile(out_ptr, out_MD / sum_M[:, None], query, queries, head_dim, HEAD_DIM)


@triton.jit(do_not_specialize=SIZES)
def follower_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    out_ptr,
    lse_ptr,
    q_batch_stride,
    q_head_stride,
    q_row_stride,
    k_batch_stride,
    k_head_stride,
    k_row_stride,
    v_batch_stride,
    v_head_stride,
    v_row_stride,
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
    """One query block of one head: O = P V, P from lse."""
    blocks = tl.cdiv(queries, BLOCK_M)
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    batch = slot // heads
    head = slot % heads
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head // k_group * k_head_stride
    v_ptr += batch * v_batch_stride + head // v_group * v_head_stride
    mask_ptr += batch * mask_batch_stride + head * mask_head_stride

    query = first_query + tl.arange(0, BLOCK_M)
    q_MD = load_tile(q_ptr, query, q_row_stride, queries, head_dim, HEAD_DIM, UPCAST)
    lse_M = load_base2_lse(lse_ptr + slot * queries, query, queries)
    out_MD = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    seen_by_all = tl.minimum(first_query + offset + 1, keys)
    for first_key in range(0, tl.minimum(first_query + BLOCK_M + offset, keys), BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        k_ND = load_tile(k_ptr, key, k_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
        v_ND = load_tile(v_ptr, key, v_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), input_precision="ieee") * scale_log2
        partial = first_key + BLOCK_N > seen_by_all
        s_MN = hide(
            s_MN, query[:, None], key[None, :], queries, keys, offset, partial,
            mask_ptr, mask_row_stride, HAS_MASK,
        )  # fmt: skip
        p_MN = tl.exp2(s_MN - lse_M[:, None])
        out_MD = tl.dot(p_MN.to(v_ND.dtype), v_ND, out_MD, input_precision="ieee")

    out_ptr += slot * queries * head_dim
    store_tile(out_ptr, out_MD, query, queries, head_dim, HEAD_DIM)
