"""Shared attention in row chunks: the fast path on a CPU, in torch operations.

The leader's A is kept as chunks of `CHUNK_ROWS` queries, one behind the other in one flat buffer. A
causal chunk is only as wide as its last query sees, so the triangle costs half of the square. Above
`STORED_BYTES_LIMIT` nothing is kept: followers recompute, and the backward pass rebuilds a chunk as
exp(S - lse), which is final at once.

16-bit inputs are computed in float32; A is kept in the input's dtype, and its rows are divided by
the sum of their rounded entries.

Shapes: B batch, h query heads, g key/value heads, r = h/g, N queries, M keys, d and e widths of
keys and values, c and w rows and columns of a chunk. The rows of a group's r query heads are
stacked (r c rows), so that its K and V are read once. A chunk spans as many elements of the batch
(b) as keep its scores near `CHUNK_ENTRIES`, or one.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

CHUNK_ROWS = 96
CHUNK_ENTRIES = 1 << 21
STORED_BYTES_LIMIT = 1 << 30


class _Chunk(NamedTuple):
    batch: slice
    rows: slice
    width: int
    shape: torch.Size

    def of(self, t: Tensor) -> Tensor:
        """Rows of t [B, h, N, ...] that the chunk covers, in the working dtype."""
        return t[self.batch, :, self.rows].to(_working_dtype(t))

    def keys(self, t: Tensor) -> Tensor:
        """[B, g, M, d] -> the keys that the chunk sees [b g, w, d]."""
        return t[self.batch, :, : self.width].flatten(0, 1)


def leader_forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O = A V [B, h, N, e], lse [B, h, N] and the kept chunks of A, flat.

    Args:
        q: [B, h, N, d].
        k: [B, g, M, d].
        v: [B, g, M, e].
        mask: None or boolean [B or 1, h or 1, N, M], True = attend.
        causal: query i sees the keys j <= i + M - N.
        scale: of the scores.
    """
    kept = q.new_empty(stored_entries(q, k, causal))
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=_working_dtype(q))
    K, V = _working(k), _working(v)
    pieces = kept.numel() > 0
    in_place = pieces and kept.dtype == lse.dtype
    raw = _workspace(q, k)
    normalised = raw if in_place else torch.empty_like(raw)
    offset = 0
    for chunk in _chunks(q, k, causal):
        S = _scores(raw, q, K, chunk, mask, causal, scale)
        piece = kept[offset : offset + S.numel()].view(chunk.shape) if pieces else None
        offset += S.numel()
        A = torch.softmax(S, -1, out=piece if in_place else _part(normalised, chunk))
        # The row's highest score is log of the row's highest probability plus lse.
        highest = S.amax(-1)
        rows = highest - A.amax(-1).log()
        if mask is not None:
            dead = highest == -torch.inf
            A.masked_fill_(dead[..., None], 0)
            rows.masked_fill_(dead, -torch.inf)
        lse[chunk.batch, :, chunk.rows] = rows
        if piece is not None and not in_place:
            A = _normalised(piece.copy_(A), A)
        _multiply(A, V, out, chunk)
    return out, lse, kept


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
    """Return O = A V [B, h, N, e] for v [B, g', M, e], where g' divides h."""
    square = not causal or q.shape[2] == k.shape[2]
    if not probabilities.numel() and mask is None and square and v.shape[3] == q.shape[3]:
        # SDPA takes one pass over tiles in cache. Its causal mask is aligned top-left, and it turns
        # a boolean mask into numbers, [N, M] of them.
        K, V = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return scaled_dot_product_attention(q, K, V, is_causal=causal, scale=scale).contiguous()
    out = q.new_empty(*q.shape[:3], v.shape[3])
    V = _working(v)
    for chunk, A in _probabilities(q, k, lse, probabilities, mask, causal, scale):
        _multiply(A, V, out, chunk)
    return out


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
    """Return dV = A^T dO [B, kv_heads, M, e], summed over the query heads of a group."""
    sizes = (q.shape[0], kv_heads, k.shape[2], grad_out.shape[3])
    grad_v = q.new_zeros(sizes, dtype=_working_dtype(q))
    for chunk, A in _probabilities(q, k, lse, probabilities, mask, causal, scale):
        A, dO = _stacked(A, kv_heads), _stacked(chunk.of(grad_out), kv_heads)
        chunk.keys(grad_v).baddbmm_(A.mT, dO)
    return grad_v.to(q.dtype)


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
    """Return dQ and dK of all layers of a group at once.

    dS = A o (sum_l dO_l V_l^T - delta) is one product over the concatenated features, in which
    delta is one feature more:  [dO_1 .. dO_m, -delta] [V_1 .. V_m, 1]^T.

    Args:
        q: [B, h, N, d].
        k: [B, g, M, d].
        lse: [B, h, N].
        probabilities: the kept chunks of A, or empty.
        values: m of [B, g_l, M, e_l].
        grad_outs: m of [B, h, N, e_l].
        delta: sum_l rowsum(dO_l o O_l), [B, h, N].
        mask: as in the forward pass.
        causal: likewise.
        scale: likewise.
    """
    heads, kv_heads, value_heads = q.shape[1], k.shape[1], values[0].shape[1]
    if any(v.shape[1] != value_heads for v in values):
        values = [v.repeat_interleave(heads // v.shape[1], dim=1) for v in values]
        value_heads = heads
    working = _working_dtype(q)
    ones = k.new_ones(*values[0].shape[:3], 1, dtype=working)
    V = torch.cat([*(v.to(working) for v in values), ones], dim=3)
    dO = torch.cat([*(g.to(working) for g in grad_outs), -delta[..., None].to(working)], dim=3)

    K = _working(k)
    grad_q = q.new_empty(q.shape)
    grad_k = k.new_zeros(k.shape, dtype=working)
    buffer = _workspace(q, k)
    for chunk, A in _probabilities(q, k, lse, probabilities, mask, causal, scale):
        dS = _part(buffer, chunk)
        rows = _stacked(chunk.of(dO), value_heads)
        torch.bmm(rows, chunk.keys(V).mT, out=_stacked(dS, value_heads))
        dS.mul_(A)
        _multiply(dS, K, grad_q, chunk, scale)
        rows = _stacked(chunk.of(q), kv_heads)
        chunk.keys(grad_k).baddbmm_(_stacked(dS, kv_heads).mT, rows, alpha=scale)
    return grad_q, grad_k.to(k.dtype)


def stored_entries(q: Tensor, k: Tensor, causal: bool) -> int:
    """Return how many entries of A are kept; 0 over `STORED_BYTES_LIMIT`.

    A closed form, so that a compiler that knows the sizes only as symbols can follow it.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    entries = queries * keys
    if causal:
        full, rest = queries // CHUNK_ROWS, queries % CHUNK_ROWS
        triangle = CHUNK_ROWS * (full * (full + 1)) // 2
        entries = CHUNK_ROWS * (full * (keys - queries) + triangle) + rest * keys
    entries = batch * heads * entries
    return entries if entries * q.element_size() <= STORED_BYTES_LIMIT else 0


def _chunks(q: Tensor, k: Tensor, causal: bool) -> Iterator[_Chunk]:
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    elements = _chunk_elements(q, k)
    for first in range(0, batch, elements):
        last = min(first + elements, batch)
        for start in range(0, queries, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, queries)
            width = keys - queries + stop if causal else keys
            shape = torch.Size((last - first, heads, stop - start, width))
            yield _Chunk(slice(first, last), slice(start, stop), width, shape)


def _probabilities(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kept: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Iterator[tuple[_Chunk, Tensor]]:
    """Yield A [b, h, c, w] chunk by chunk, kept or rebuilt; the next chunk may overwrite it."""
    offset = 0
    K = None if kept.numel() else _working(k)
    buffer = None if kept.numel() and kept.dtype == lse.dtype else _workspace(q, k)
    for chunk in _chunks(q, k, causal):
        if K is None:
            piece = kept[offset : offset + chunk.shape.numel()].view(chunk.shape)
            offset += chunk.shape.numel()
            yield chunk, piece if buffer is None else _normalised(piece, _part(buffer, chunk))
        else:
            assert buffer is not None
            S = _scores(buffer, q, K, chunk, mask, causal, scale)
            # A row without keys has lse = -inf and scores of -inf; exp(-inf - 0) = 0.
            rows = chunk.of(lse).unsqueeze(-1)
            yield chunk, S.sub_(rows.masked_fill(rows == -torch.inf, 0)).exp_()


def _scores(
    buffer: Tensor,
    q: Tensor,
    K: Tensor,
    chunk: _Chunk,
    mask: Tensor | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """Return scale Q K^T [b, h, c, w] in `buffer`, -inf where a query may not attend."""
    S = _part(buffer, chunk)
    groups = K.shape[1]
    product = _stacked(S, groups)
    rows = _stacked(chunk.of(q), groups)
    torch.baddbmm(product, rows, chunk.keys(K).mT, beta=0, alpha=scale, out=product)
    if causal:
        # Only the last c columns hold keys that some query of the chunk may not see.
        count = S.shape[2]
        ahead = torch.ones(count, count, dtype=torch.bool, device=q.device).triu_(1)
        S[..., chunk.width - count :].masked_fill_(ahead, -torch.inf)
    if mask is not None:
        batch = chunk.batch if mask.shape[0] > 1 else slice(None)
        S.masked_fill_(~mask[batch, :, chunk.rows, : chunk.width], -torch.inf)
    return S


def _multiply(A: Tensor, V: Tensor, out: Tensor, chunk: _Chunk, scale: float = 1.0) -> None:
    """Write scale A V into the chunk's rows of out [B, h, N, e], for V [B, g, M, e]."""
    groups, width = V.shape[1], V.shape[3]
    rows = out[chunk.batch, :, chunk.rows]
    in_place = rows.dtype == V.dtype and groups == out.shape[1]
    # Without grouped heads the rows are written where they belong, which saves a tenth at N = 512.
    place = rows.flatten(0, 1) if in_place else None
    product = torch.bmm(_stacked(A, groups), chunk.keys(V), out=place)
    if scale != 1.0:
        product.mul_(scale)
    if not in_place:
        rows.copy_(product.view(*rows.shape[:3], width))


def _normalised(piece: Tensor, into: Tensor) -> Tensor:
    """Return a 16-bit chunk in the working dtype, each row over the sum of its rounded entries."""
    if piece.dtype == into.dtype:
        return piece
    into.copy_(piece)
    return into.div_(into.sum(-1, keepdim=True).clamp_min_(torch.finfo(into.dtype).tiny))


def _working_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _working(t: Tensor) -> Tensor:
    return t.to(_working_dtype(t)).contiguous()


def _chunk_elements(q: Tensor, k: Tensor) -> int:
    """How many elements of the batch a chunk spans."""
    batch, heads, queries, _ = q.shape
    entries = heads * min(CHUNK_ROWS, queries) * k.shape[2]
    return min(batch, max(1, CHUNK_ENTRIES // entries))


def _workspace(q: Tensor, k: Tensor) -> Tensor:
    """Allocate one chunk [b, h, c, M], flat: fresh memory a chunk would fault in every page."""
    rows = min(CHUNK_ROWS, q.shape[2])
    entries = _chunk_elements(q, k) * q.shape[1] * rows * k.shape[2]
    return q.new_empty(entries, dtype=_working_dtype(q))


def _part(buffer: Tensor, chunk: _Chunk) -> Tensor:
    return buffer[: chunk.shape.numel()].view(chunk.shape)


def _stacked(rows: Tensor, groups: int) -> Tensor:
    """[b, h, c, n] -> [b g, r c, n]; of a chunk of A a view."""
    batch, heads, count, width = rows.shape
    return rows.reshape(batch * groups, heads // groups * count, width)
