"""Triton kernel of attention and its directional derivative, in one pass over the keys.

    S = scale Q Kᵀ,    P = softmax of S row by row,    O = P V
    Ṡ = scale (Q̇ Kᵀ + Q K̇ᵀ),    H = P ∘ Ṡ,    Ȯ = P V̇ + H V - diag(rowsum H) O

Over the key blocks j (m, l and r are the running row maximum and the row sums of p and h):

    m' = max(m, rowmax S_j),  a = e^(m - m'),  p = exp(S_j - m'),  h = p ∘ (Ṡ_j - c)
    l' = a l + rowsum p,  r' = a r + rowsum h,  O' = a O + p V_j,  C' = a C + p V̇_j + h V_j;

    at the end  O / l,  Ȯ = (C - r O / l) / l  and  lse = m + log l

P V̇ and H V decay alike, hence the one accumulator C. Any c, one number a row, cancels in Ȯ; it is
the mean of Ṡ over the first block in which the row sees a key. What the keys of a row have in
common, such as an offset of all keys, would without it be rounded within h and subtracted at the
end. r sums h as it is rounded for its product, so what all values have in common cancels too.

Exponentials are in base 2, with log2(e) folded into the scale of S but not into that of Ṡ; lse is a
natural logarithm. Where a key is hidden S = -inf and Ṡ = 0. A row that sees no key has l = 0: it
gets O = Ȯ = 0 and lse = -inf. Query i sees key j when j <= i + offset; the offset is M - N for
causal attention, aligned bottom-right, and M where every key is visible.

Letters of a tile's name are its axes: M queries, N keys, D the head dim and E the value dim, both
padded to 64, or to 128 where one of them needs it. Before them _t marks a tangent.

Sources: sCM, arXiv 2410.11081, appendix F; rCM, arXiv 2510.08431, appendix C (the recurrence).
"""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl

from stillhouse_kernels.compilation import Compilation
from stillhouse_kernels.shared_attention.forward_kernels import LN_2
from stillhouse_kernels.shared_attention.kernel import MAX_HEAD_DIM
from stillhouse_kernels.tiles import has_wide_mask, hide, load_tile, store_tile

# One compiled kernel serves every length: 1 and multiples of 16 are not compiled apart.
_SIZES = ("heads", "k_group", "v_group", "queries", "keys", "offset")


@triton.jit
def _add_scores(
    s_MN,
    q_ptr,
    query,
    q_row_stride,
    queries,
    k_ptr,
    key,
    k_row_stride,
    keys,
    head_dim,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """S + Q Kᵀ, the sum over a block of columns after the other."""
    for first in range(0, head_dim, BLOCK_D):
        columns = head_dim - first
        q_MD = load_tile(q_ptr + first, query, q_row_stride, queries, columns, BLOCK_D, UPCAST)
        k_ND = load_tile(k_ptr + first, key, k_row_stride, keys, columns, BLOCK_D, UPCAST)
        s_MN = tl.dot(q_MD, tl.trans(k_ND), s_MN, input_precision="ieee")
    return s_MN


@triton.jit(do_not_specialize=_SIZES)
def jvp_forward(
    q_ptr,
    k_ptr,
    v_ptr,
    q_t_ptr,
    k_t_ptr,
    v_t_ptr,
    mask_ptr,
    out_ptr,
    out_t_ptr,
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
    q_t_batch_stride,
    q_t_head_stride,
    q_t_row_stride,
    k_t_batch_stride,
    k_t_head_stride,
    k_t_row_stride,
    v_t_batch_stride,
    v_t_head_stride,
    v_t_row_stride,
    mask_batch_stride,
    mask_head_stride,
    mask_row_stride,
    heads,
    k_group,
    v_group,
    queries,
    keys,
    head_dim,
    value_dim,
    offset,
    scale,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_Q_TANGENT: tl.constexpr,
    HAS_K_TANGENT: tl.constexpr,
    HAS_V_TANGENT: tl.constexpr,
    HAS_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One query block of one head: O, Ȯ and lse."""
    blocks = tl.cdiv(queries, BLOCK_M)
    # Under a causal mask the last block is the longest: it starts first.
    first_query = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    batch = slot // heads
    head = slot % heads
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head // k_group * k_head_stride
    v_ptr += batch * v_batch_stride + head // v_group * v_head_stride
    q_t_ptr += batch * q_t_batch_stride + head * q_t_head_stride
    k_t_ptr += batch * k_t_batch_stride + head // k_group * k_t_head_stride
    v_t_ptr += batch * v_t_batch_stride + head // v_group * v_t_head_stride
    mask_ptr += batch * mask_batch_stride + head * mask_head_stride

    query = first_query + tl.arange(0, BLOCK_M)
    if BLOCK_D == HEAD_DIM:
        q_MD = load_tile(q_ptr, query, q_row_stride, queries, head_dim, HEAD_DIM, UPCAST)
        if HAS_Q_TANGENT:
            q_t_MD = load_tile(q_t_ptr, query, q_t_row_stride, queries, head_dim, HEAD_DIM, UPCAST)
    maximum_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    sum_M = tl.zeros([BLOCK_M], tl.float32)
    sum_t_M = tl.zeros([BLOCK_M], tl.float32)
    centre_M = tl.zeros([BLOCK_M], tl.float32)
    out_ME = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    out_t_ME = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    seen_by_all = tl.minimum(first_query + offset + 1, keys)
    for first_key in range(0, tl.minimum(first_query + BLOCK_M + offset, keys), BLOCK_N):
        key = first_key + tl.arange(0, BLOCK_N)
        s_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        s_t_MN = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if BLOCK_D == HEAD_DIM:
            k_ND = load_tile(k_ptr, key, k_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
            s_MN = tl.dot(q_MD, tl.trans(k_ND), s_MN, input_precision="ieee")
            if HAS_Q_TANGENT:
                s_t_MN = tl.dot(q_t_MD, tl.trans(k_ND), s_t_MN, input_precision="ieee")
            if HAS_K_TANGENT:
                k_t_ND = load_tile(k_t_ptr, key, k_t_row_stride, keys, head_dim, HEAD_DIM, UPCAST)
                s_t_MN = tl.dot(q_MD, tl.trans(k_t_ND), s_t_MN, input_precision="ieee")
        else:
            s_MN = _add_scores(
                s_MN, q_ptr, query, q_row_stride, queries, k_ptr, key, k_row_stride, keys,
                head_dim, BLOCK_D, UPCAST,
            )  # fmt: skip
            if HAS_Q_TANGENT:
                s_t_MN = _add_scores(
                    s_t_MN, q_t_ptr, query, q_t_row_stride, queries, k_ptr, key, k_row_stride, keys,
                    head_dim, BLOCK_D, UPCAST,
                )  # fmt: skip
            if HAS_K_TANGENT:
                s_t_MN = _add_scores(
                    s_t_MN, q_ptr, query, q_row_stride, queries, k_t_ptr, key, k_t_row_stride, keys,
                    head_dim, BLOCK_D, UPCAST,
                )  # fmt: skip
        s_MN *= scale_log2
        partial = first_key + BLOCK_N > seen_by_all
        s_MN = hide(
            s_MN, query[:, None], key[None, :], queries, keys, offset, partial,
            mask_ptr, mask_row_stride, HAS_MASK,
        )  # fmt: skip
        maximum_new_M = tl.maximum(maximum_M, tl.max(s_MN, 1))
        # A row that has seen no key yet would subtract -inf from -inf.
        finite_M = tl.where(maximum_new_M == float("-inf"), 0.0, maximum_new_M)
        p_MN = tl.exp2(s_MN - finite_M[:, None])
        p_sum_M = tl.sum(p_MN, 1)
        decay_M = tl.exp2(maximum_M - finite_M)
        v_NE = load_tile(v_ptr, key, v_row_stride, keys, value_dim, HEAD_DIM, UPCAST)
        out_t_ME *= decay_M[:, None]
        if HAS_Q_TANGENT or HAS_K_TANGENT:
            s_t_MN *= scale
            if partial | HAS_MASK:
                s_t_MN = tl.where(s_MN == float("-inf"), 0.0, s_t_MN)
            if (first_key == 0) | HAS_MASK:
                # In a row that has seen no key before, p sums to at least 1, or to 0 if still so.
                mean_M = tl.sum(p_MN * s_t_MN, 1) / tl.maximum(p_sum_M, 1.0)
                centre_M = tl.where(sum_M == 0.0, mean_M, centre_M)
            h_MN = (p_MN * (s_t_MN - centre_M[:, None])).to(v_NE.dtype)
            sum_t_M = sum_t_M * decay_M + tl.sum(h_MN.to(tl.float32), 1)
            out_t_ME = tl.dot(h_MN, v_NE, out_t_ME, input_precision="ieee")
        p_rounded_MN = p_MN.to(v_NE.dtype)
        out_ME = tl.dot(p_rounded_MN, v_NE, out_ME * decay_M[:, None], input_precision="ieee")
        if HAS_V_TANGENT:
            v_t_NE = load_tile(v_t_ptr, key, v_t_row_stride, keys, value_dim, HEAD_DIM, UPCAST)
            out_t_ME = tl.dot(p_rounded_MN, v_t_NE, out_t_ME, input_precision="ieee")
        sum_M = sum_M * decay_M + p_sum_M
        maximum_M = maximum_new_M

    seen_M = sum_M > 0.0
    sum_M = tl.where(seen_M, sum_M, 1.0)
    lse_M = tl.where(seen_M, (maximum_M + tl.log2(sum_M)) * LN_2, float("-inf"))
    tl.store(lse_ptr + slot * queries + query, lse_M, mask=query < queries)
    out_ptr += slot * queries * value_dim
    out_t_ptr += slot * queries * value_dim
    out_ME /= sum_M[:, None]
    out_t_ME = (out_t_ME - sum_t_M[:, None] * out_ME) / sum_M[:, None]
    store_tile(out_ptr, out_ME, query, queries, value_dim, HEAD_DIM)
    store_tile(out_t_ptr, out_t_ME, query, queries, value_dim, HEAD_DIM)


# The tangents of Q, K and V that a launch may be given; another set is filled up with zeros to all.
PATTERNS = {
    "all": (True, True, True),
    "query": (True, False, False),
    "value": (False, False, True),
}

# Chip, padded head dim and bits of the dtype: (BLOCK_M, BLOCK_N, num_warps, num_stages) of the
# patterns in turn. The largest tiles that leave nothing in local memory, masked or not. sm_80's fit
# into the 99 KiB of sm_86 and sm_89 too. Products in float32 run outside the matrix unit, from
# registers, hence the small tiles.
_TILES = {
    (80, 64, 16): ((128, 32, 8, 2), (128, 32, 8, 3), (128, 64, 8, 3)),
    (80, 64, 32): ((32, 32, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)),
    (80, 128, 16): ((64, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2)),
    (80, 128, 32): ((32, 32, 8, 1), (64, 32, 8, 2), (32, 32, 8, 2)),
    (90, 64, 16): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2)),
    (90, 64, 32): ((32, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    (90, 128, 16): ((128, 32, 8, 3), (128, 32, 8, 3), (128, 64, 8, 3)),
    (90, 128, 32): ((32, 32, 8, 1), (32, 64, 8, 2), (32, 32, 8, 2)),
    (100, 64, 16): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2)),
    (100, 64, 32): ((32, 32, 8, 1), (32, 64, 8, 2), (64, 32, 8, 2)),
    (100, 128, 16): ((128, 32, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    (100, 128, 32): ((32, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 2)),
}
# Small, so that tensors of a test have several.
INTERPRETER_TILE = (32, 32, 4, 1)


def configuration(pattern: str, capability: int, head_dim: int, bits: int) -> dict[str, int]:
    """Return the constexprs and options that the kernel is launched with.

    Args:
        pattern: one of `PATTERNS`.
        capability: of the device, as 80 or 90; 0 is the interpreter. One that the table lacks takes
            the nearest lower chip's entry.
        head_dim: the larger of head dim and value dim, at most `MAX_HEAD_DIM`.
        bits: of the tensors' dtype.
    """
    padded = 64 if head_dim <= 64 else MAX_HEAD_DIM
    tile = INTERPRETER_TILE
    if capability:
        # sm_120 has sm_89's shared memory and no tensor memory.
        chip = 80 if capability >= 120 else max(c for c in (80, 90, 100) if c <= capability)
        tile = dict(zip(PATTERNS, _TILES[chip, padded, bits], strict=True))[pattern]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    tangents = ("HAS_Q_TANGENT", "HAS_K_TANGENT", "HAS_V_TANGENT")
    return {
        "HEAD_DIM": padded,
        # Rows of 128 float32 of Q, Q̇ and K at once are more than a thread has registers.
        "BLOCK_D": padded if bits == 16 else 64,
        **dict(zip(names, tile, strict=True)),
        **dict(zip(tangents, PATTERNS[pattern], strict=True)),
    }


def compilations(capability: int) -> Iterator[Compilation]:
    """Every specialisation that a launch on ordinary tensors can choose on a chip.

    Args:
        capability: compute capability as 80, 90 or 100.
    """
    dtypes = (("fp32", 32), ("fp16", 16), ("bf16", 16))
    for pattern, head_dim, (dtype, bits), masked in product(
        PATTERNS, (64, 128), dtypes, (False, True)
    ):
        constexprs = configuration(pattern, capability, head_dim, bits)
        num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
        constexprs |= {"HAS_MASK": masked, "UPCAST": False}
        arguments = [name for name in jvp_forward.arg_names if name not in constexprs]
        mask = "*i32" if has_wide_mask(capability, bits) else "*u8"
        yield Compilation(
            kernel=jvp_forward,
            label=f"{pattern}, head_dim {head_dim}, {dtype}{', masked' if masked else ''}",
            signature={name: _triton_type(name, dtype, mask) for name in arguments},
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=num_stages,
            divisible=tuple(n for n in arguments if n.endswith(("_stride", "_dim"))),
            matrix_product=bits == 16,
        )


def _triton_type(argument: str, dtype: str, mask: str) -> str:
    if argument.endswith("_ptr"):
        own = {"mask_ptr": mask, "lse_ptr": "*fp32"}
        return own.get(argument, f"*{dtype}")
    return "fp32" if argument.startswith("scale") else "i32"
