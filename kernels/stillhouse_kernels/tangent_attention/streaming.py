"""Attention and its tangent in chunks of query rows: the fast path on a CPU, in torch operations.

Four products a chunk, P the weights before they are normalised, l their row sums:

    S = scale Q Kᵀ      Ṡ = scale [Q̇ Q] [K K̇]ᵀ      [O' A] = P [V V̇]      C = H V,  H = P ∘ Ṡ
    O = O' / l          μ = rowsum H / l              Ȯ = (A + C) / l - μ O

Keys are taken relative to one of their means, K̇ too. That moves a row of S and of Ṡ by a constant,
so O and Ȯ stay as they are, and Ȯ is no longer the small difference of two large numbers. Under a
causal mask the mean is that of the keys which every query sees: no query may depend on a later key,
not by a rounding either.

P = exp(S) at once where |Q| |K| bounds the scores well within the range of a float; else a row's
maximum is taken off first, which costs two more passes over the chunk.

16-bit inputs are computed in float32. The primal alone goes through torch's flash attention where
that can take it, both ways.

Shapes: B batch, h query heads, g key/value heads, r = h/g, N queries, M keys, d and e widths of
keys and values. A block is n = some elements of the batch times some key/value heads; a chunk of it
has c query rows and w keys. The rows of a head's r queries are stacked (r c rows), so that K and V
are read once.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from stillhouse_kernels.shared_attention import streaming as shared

# Scores that exist at a time, and as many of their tangent: half of Q's entries within these, so
# that a chunk is no larger than what comes in, and large enough for its products.
CHUNK_ENTRIES = (1 << 18, 1 << 20)
LARGEST_SCORE = 40.0  # whose exponential, and its inverse, may be added up in float32

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return O [B, h, N, e] and lse [B, h, N].

    Args:
        q: [B, h, N, d].
        k: [B, g, M, d].
        v: [B, g, M, e].
        mask: None or boolean [B or 1, h or 1, N, M], True = attend.
        causal: query i sees the keys j <= i + M - N.
        scale: of the scores.
    """
    if _flash_takes(q, k, v, mask, causal):
        K, V = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        out, lse = _flash(q, K, V, 0.0, causal, scale=scale)
        return out.contiguous(), lse.contiguous()
    out, _, lse = _pass(_Inputs(q, k, v, None, None, None, mask, causal, scale))
    return out, lse


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
    """Return O, Ȯ [B, h, N, e] and lse [B, h, N]; tangents as their primals, one at least."""
    out, out_t, lse = _pass(_Inputs(q, k, v, q_t, k_t, v_t, mask, causal, scale))
    assert out_t is not None
    return out, out_t, lse


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
    """Return dQ [B, h, N, d], dK [B, g, M, d] and dV [B, g, M, e] of the primal."""
    groups = k.shape[1]
    if _flash_takes(q, k, v, mask, causal):
        K, V = (t.repeat_interleave(q.shape[1] // groups, dim=1) for t in (k, v))
        grads = _flash_backward(grad_out, q, K, V, out, lse, 0.0, causal, scale=scale)
        grad_q, *rest = (t.contiguous() for t in grads)
        grad_k, grad_v = (t.unflatten(1, (groups, -1)).sum(2) for t in rest)
        return grad_q, grad_k, grad_v
    working = _working_dtype(q)
    delta = (grad_out.to(working) * out.to(working)).sum(-1)
    kept = q.new_empty(0)
    settings = (mask, causal, scale)
    grad_v = shared.value_backward(q, k, lse, kept, grad_out, *settings, groups)
    grad_q, grad_k = shared.score_backward(q, k, lse, kept, [v], [grad_out], delta, *settings)
    return grad_q, grad_k, grad_v


def _flash_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool) -> bool:
    """Whether torch's kernel computes the same: it aligns a causal mask top-left."""
    square = not causal or q.shape[2] == k.shape[2]
    return mask is None and square and q.device.type == "cpu" and v.shape[3] == q.shape[3]


class _Block(NamedTuple):
    """Elements of the batch and key/value heads that are computed at once."""

    batch: slice
    groups: slice

    def keys(self, t: Tensor) -> Tensor:
        """[B, g, M, d] -> [n, M, d] in the working dtype."""
        return t[self.batch, self.groups].to(_working_dtype(t)).flatten(0, 1)

    def heads(self, repeats: int) -> slice:
        """The query heads that read the block's keys."""
        return slice(self.groups.start * repeats, self.groups.stop * repeats)


@dataclass(frozen=True)
class _Inputs:
    """What comes in, and how it is cut into blocks and chunks."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Tensor | None
    k_t: Tensor | None
    v_t: Tensor | None
    mask: Tensor | None
    causal: bool
    scale: float

    @property
    def repeats(self) -> int:
        """r."""
        return self.q.shape[1] // self.k.shape[1]

    @property
    def chunk_rows(self) -> int:
        """How many queries a chunk has: fewer where a triangle wastes them, or rows are long."""
        return min(128 if self.causal or self.k.shape[2] > 1024 else 256, self.q.shape[2])

    @property
    def block_sizes(self) -> tuple[int, int]:
        """How many elements of the batch a block spans, and how many key/value heads of each."""
        batch, groups, keys = self.k.shape[:3]
        least, most = CHUNK_ENTRIES
        entries = min(max(self.q.numel() // 2, least), most)
        fitting = max(1, entries // (self.chunk_rows * self.repeats * keys))
        return (min(batch, fitting // groups), groups) if fitting >= groups else (1, fitting)

    def blocks(self) -> Iterator[_Block]:
        """Whole elements of the batch where several fit, else some of one element's heads."""
        batch, groups = self.k.shape[:2]
        elements, of_one = self.block_sizes
        for first in range(0, batch, elements):
            for group in range(0, groups, of_one):
                heads = slice(group, min(group + of_one, groups))
                yield _Block(slice(first, min(first + elements, batch)), heads)

    def chunks(self) -> Iterator[tuple[slice, int]]:
        """The rows of each chunk, and how many keys w they see."""
        queries, keys = self.q.shape[2], self.k.shape[2]
        for start in range(0, queries, self.chunk_rows):
            stop = min(start + self.chunk_rows, queries)
            yield slice(start, stop), keys - queries + stop if self.causal else keys

    def queries(self, t: Tensor, block: _Block, rows: slice) -> Tensor:
        """[B, h, N, d] -> [n, r c, d] in the working dtype."""
        part = t[block.batch, block.heads(self.repeats), rows].to(_working_dtype(t))
        return part.unflatten(1, (-1, self.repeats)).flatten(2, 3).flatten(0, 1)

    def workspace(self) -> tuple[Tensor, Tensor]:
        """Allocate a chunk of S and Ṡ, flat: fresh memory a chunk would fault in every page."""
        elements, groups = self.block_sizes
        entries = elements * groups * self.repeats * self.chunk_rows * self.k.shape[2]
        S, S_t = (self.q.new_empty(entries, dtype=_working_dtype(self.q)) for _ in range(2))
        return S, S_t


class _Keys(NamedTuple):
    """What the chunks of a block share.

    Attributes:
        KK: K, and K̇ beside it where it is given [n, M, d or 2d], centred.
        VV: V, and V̇ beside it where it is given [n, M, e or 2e].
        centre: what was taken off K [n, d, 1].
        largest: the norm of K's longest row.
    """

    KK: Tensor
    VV: Tensor
    centre: Tensor
    largest: Tensor

    @classmethod
    def of(cls, x: _Inputs, block: _Block) -> "_Keys":
        K, V = block.keys(x.k), block.keys(x.v)
        seen_by_all = x.k.shape[2] - x.q.shape[2] + 1 if x.causal else None
        centre = K[:, :seen_by_all].mean(1, keepdim=True)
        K = K - centre
        largest = K.norm(dim=2).amax()
        if x.k_t is not None:
            K_t = block.keys(x.k_t)
            K = torch.cat([K, K_t - K_t[:, :seen_by_all].mean(1, keepdim=True)], 2)
        if x.v_t is not None:
            V = torch.cat([V, block.keys(x.v_t)], 2)
        return cls(K, V, centre.mT, largest)


def _pass(x: _Inputs) -> tuple[Tensor, Tensor | None, Tensor]:
    """Return O, Ȯ (None where no tangent is given) and lse."""
    out = x.q.new_empty(*x.q.shape[:3], x.v.shape[3])
    out_t = None if x.q_t is None and x.k_t is None and x.v_t is None else torch.empty_like(out)
    lse = x.q.new_empty(x.q.shape[:3], dtype=_working_dtype(x.q))
    workspace = x.workspace()
    for block in x.blocks():
        keys = _Keys.of(x, block)
        for rows, w in x.chunks():
            seen = keys._replace(KK=keys.KK[:, :w], VV=keys.VV[:, :w])
            part, part_t, row_lse = _chunk(x, seen, block, rows, workspace)
            at = (block.batch, block.heads(x.repeats), rows)
            out[at] = part.reshape(out[at].shape)
            lse[at] = row_lse.view(lse[at].shape)
            if out_t is not None:
                out_t[at] = part_t.reshape(out[at].shape)
    return out, out_t, lse


def _chunk(
    x: _Inputs, keys: _Keys, block: _Block, rows: slice, workspace: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O, Ȯ [n, r c, e] and lse [n, r c, 1] of a chunk, whose keys are those it sees."""
    d, e = x.q.shape[3], x.v.shape[3]
    Q = x.queries(x.q, block, rows)
    Q_t = None if x.q_t is None else x.queries(x.q_t, block, rows)
    K, V = keys.KK[..., :d], keys.VV[..., :e]
    shape = (*Q.shape[:2], K.shape[1])
    S, S_t = (buffer[: shape[0] * shape[1] * shape[2]].view(shape) for buffer in workspace)

    torch.baddbmm(S, Q, K.mT, beta=0, alpha=x.scale, out=S)
    _hide(S, x, block, rows)
    small = bool(abs(x.scale) * Q.norm(dim=2).amax() * keys.largest < LARGEST_SCORE)
    P, highest = _exponentials(S, small)
    total = P.sum(2, keepdim=True)
    lse = total.log().add_(highest).add_(Q @ keys.centre, alpha=x.scale)
    # A row without keys is 0 / 1.
    total.masked_fill_(total == 0, 1)
    averages = (P @ keys.VV).div_(total)
    out = averages[..., :e]
    out_t = torch.zeros_like(out) if x.v_t is None else averages[..., e:]
    if Q_t is not None or x.k_t is not None:
        if x.k_t is None:
            left, right = Q_t, K
        elif Q_t is None:
            left, right = Q, keys.KK[..., d:]
        else:
            left, right = torch.cat([Q_t, Q], 2), keys.KK
        assert left is not None
        torch.baddbmm(S_t, left, right.mT, beta=0, alpha=x.scale, out=S_t)
        H = S_t.mul_(P)
        mean = H.sum(2, keepdim=True).div_(total)
        out_t = (H @ V).div_(total).add_(out_t).addcmul_(mean, out, value=-1)
    return out, out_t, lse


def _exponentials(S: Tensor, small: bool) -> tuple[Tensor, Tensor]:
    """Return exp(S - m) in the place of S, and m [n, r c, 1]: 0 where no score is large."""
    if small:
        return S.exp_(), S.new_zeros(1)
    highest = S.amax(2, keepdim=True)
    # A row that sees no key would subtract -inf from -inf.
    highest.masked_fill_(highest == -torch.inf, 0)
    return S.sub_(highest).exp_(), highest


def _hide(S: Tensor, x: _Inputs, block: _Block, rows: slice) -> None:
    """Set hidden scores [n, r c, w] to -inf."""
    c, w = rows.stop - rows.start, S.shape[2]
    if x.causal:
        # Only the last c columns hold keys that some query of the chunk may not see.
        ahead = torch.ones(c, c, dtype=torch.bool, device=S.device).triu_(1)
        S.view(S.shape[0], -1, c, w)[..., w - c :].masked_fill_(ahead, -torch.inf)
    if x.mask is not None:
        batch = block.batch if x.mask.shape[0] > 1 else slice(None)
        heads = block.heads(x.repeats) if x.mask.shape[1] > 1 else slice(None)
        elements = block.batch.stop - block.batch.start
        hidden = ~x.mask[batch, heads, rows, :w]
        S.view(elements, -1, c, w).masked_fill_(hidden, -torch.inf)


def _working_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
