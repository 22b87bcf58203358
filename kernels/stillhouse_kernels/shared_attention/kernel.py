"""Triton kernels of shared attention: a leader's probabilities, any number of followers' values.

    S = scale Q Kᵀ,    P = exp(S - lse) row by row,    O_l = P V_l

Leader, over the key blocks j (m and l are the running row maximum and row sum):

    m' = max(m, rowmax S_j),  p = exp(S_j - m'),  l' = e^(m - m') l + rowsum p,
    O' = e^(m - m') O + p V_j;    at the end  O / l  and  lse = m + log l

Follower: with lse known, exp(S_j - lse) is final at once. There is no running state, and blocks add
up in any order.

Backward of a group, where δ = Σ_l rowsum(dO_l ∘ O_l) = rowsum(P ∘ dP):

    dV_l = Pᵀ dO_l,   dP = Σ_l dO_l V_lᵀ,   dS = P ∘ (dP - δ),   dQ = scale dS K,   dK = scale dSᵀ Q

dP is summed over the group inside a tile, so P is rebuilt once for all its layers and no N x M
array exists. Every output has one writer (dQ a program a query block; dK and dV a program a key
block, which walks through the query heads that share it): no atomics, hence the same bits at every
run.

Exponentials are in base 2, with log2(e) folded into the scale; lse is a natural logarithm. A row
that sees no key has l = 0: it gets O = 0 and lse = -inf, and where P is rebuilt -inf is read as
+inf, so that P = 0. Query i sees key j when j <= i + offset; the offset is M - N for causal
attention, aligned bottom-right, and M where every key is visible.

Letters of a tile's name are its axes: M queries, N keys, D the head dim, padded to 64 or 128.

Sources: FlashAttention-2, arXiv 2307.08691 (the recurrence); EchoAtt, arXiv 2409.14595 (sharing).
"""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl

from stillhouse_kernels.compilation import Compilation
from stillhouse_kernels.tiles import has_wide_mask, hide, load_tile, store_tile

MAX_HEAD_DIM = 128
MIN_CAPABILITY = 80
LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
LN_2 = tl.constexpr(0.6931471805599453)

# One compiled kernel serves every length: 1 and multiples of 16 are not compiled apart.
_SIZES = ("layers", "heads", "k_group", "v_group", "queries", "keys", "offset")


@triton.jit
def _load_base2_lse(pointer, query, queries):
    """lse in base 2; +inf for rows that see no key or do not exist, so that exp2(S - lse) is 0."""
    lse = tl.load(pointer + query, mask=query < queries, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * _LOG2_E)


@triton.jit(do_not_specialize=_SIZES)
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


@triton.jit(do_not_specialize=_SIZES)
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
    lse_M = _load_base2_lse(lse_ptr + slot * queries, query, queries)
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


@triton.jit(do_not_specialize=_SIZES)
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
            lse_M = _load_base2_lse(lse_head, query, queries)
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


@triton.jit(do_not_specialize=_SIZES)
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
    lse_M = _load_base2_lse(lse_ptr + slot * queries, query, queries)
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


@triton.jit(do_not_specialize=_SIZES)
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
            lse_M = _load_base2_lse(lse_ptr + row, query, queries)
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


_KERNELS = (leader_forward, follower_forward, value_backward, score_backward_q, score_backward_k)
_COLUMNS = dict(zip((kernel.__name__ for kernel in _KERNELS), (0, 0, 1, 2, 3), strict=True))

# Chip, padded head dim and bits of the dtype: (BLOCK_M, BLOCK_N, num_warps, num_stages) of the two
# forward kernels, value_backward, score_backward_q and score_backward_k. The largest tiles that
# leave nothing in local memory, masked or not. sm_80's fit into the 99 KiB of sm_86 and sm_89 too.
# Products in float32 run outside the matrix unit, from registers, hence the small tiles.
_TILES = {
    (80, 64, 16): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    (80, 64, 32): ((64, 64, 8, 2), (32, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
    (80, 128, 16): ((128, 64, 8, 2), (32, 128, 8, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
    (80, 128, 32): ((32, 32, 4, 2), (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
    (90, 64, 16): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    (90, 64, 32): ((64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
    (90, 128, 16): ((128, 64, 8, 3), (32, 128, 8, 3), (128, 64, 8, 2), (64, 64, 8, 3)),
    (90, 128, 32): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
    (100, 64, 16): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 128, 8, 2), (64, 128, 8, 2)),
    (100, 64, 32): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 1), (32, 64, 8, 1)),
    (100, 128, 16): ((128, 64, 8, 3), (64, 128, 8, 1), (128, 64, 8, 2), (64, 64, 8, 3)),
    (100, 128, 32): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)),
}
# Small, so that tensors of a test have several.
INTERPRETER_TILE = (32, 32, 4, 1)


def configuration(name: str, capability: int, head_dim: int, bits: int) -> dict[str, int]:
    """Return the constexprs and options that a kernel is launched with.

    Args:
        name: the kernel's.
        capability: of the device, as 80 or 90; 0 is the interpreter. One that the table lacks takes
            the nearest lower chip's entry.
        head_dim: at most `MAX_HEAD_DIM`.
        bits: of the tensors' dtype.
    """
    padded = 64 if head_dim <= 64 else MAX_HEAD_DIM
    tile = INTERPRETER_TILE
    if capability:
        # sm_120 has sm_89's shared memory and no tensor memory.
        chip = 80 if capability >= 120 else max(c for c in (80, 90, 100) if c <= capability)
        tile = _TILES[chip, padded, bits][_COLUMNS[name]]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return {"HEAD_DIM": padded, **dict(zip(names, tile, strict=True))}


def compilations(capability: int) -> Iterator[Compilation]:
    """Every specialisation that a launch on ordinary tensors can choose on a chip.

    Args:
        capability: compute capability as 80, 90 or 100.
    """
    dtypes = (("fp32", 32), ("fp16", 16), ("bf16", 16))
    for kernel, head_dim, (dtype, bits), masked in product(
        _KERNELS, (64, 128), dtypes, (False, True)
    ):
        constexprs = configuration(kernel.__name__, capability, head_dim, bits)
        num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
        constexprs |= {"HAS_MASK": masked, "UPCAST": False}
        arguments = [name for name in kernel.arg_names if name not in constexprs]
        mask = "*i32" if has_wide_mask(capability, bits) else "*u8"
        yield Compilation(
            kernel=kernel,
            label=f"head_dim {head_dim}, {dtype}{', masked' if masked else ''}",
            signature={name: _triton_type(name, dtype, mask) for name in arguments},
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=num_stages,
            divisible=tuple(n for n in arguments if n.endswith("_stride") or n == "head_dim"),
            matrix_product=bits == 16,
        )


def _triton_type(argument: str, dtype: str, mask: str) -> str:
    if argument.endswith("_ptr"):
        own = {"mask_ptr": mask, "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
        return own.get(argument, f"*{dtype}")
    return "fp32" if argument.startswith("scale") else "i32"
