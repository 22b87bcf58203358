"""ReLU linear attention and its tangent in chunks of tokens: the fast path on a CPU, in torch.

Over the keys S̄ = [V 1]ᵀ K = (S z)ᵀ is summed up, then every query is normalised before it is
multiplied, while it is d wide and in the cache:

    S̄ = [V 1]ᵀ K                 S̄' = [V 1]ᵀ K̇ + [V̇ 0]ᵀ K
    P = Q / n,  n = Q z + eps    O = P S
    Ṗ = Q̇ / n - μ P              Ȯ = Ṗ S + P Ṡ,    μ = (Q̇ z + Q ż) / n

The large products are the six of three primal calls, those of a tangent that is None fall away, and
O and Ȯ leave theirs as they are. K, K̇, P and Ṗ exist for a chunk of tokens only.

For Ȯ the values are taken relative to their mean c: what they share would be summed up and
subtracted again, which costs digits. Ṗ z + P ż = μ eps / n is all that S and Ṡ lose by it, so

    Ȯ = Ṗ (S - z cᵀ) + P (Ṡ - ż cᵀ) + (μ eps / n) cᵀ

Backward, for the gradient G of O:

    A = G Sᵀ,  δ = rowsum(P ∘ A)    dQ = (A - δ zᵀ) / n    D̄ = [G -δ]ᵀ P
    dV = K Dᵀ                       dK = [V 1] D̄

16-bit inputs are computed in float32.

Shapes: B batch, h query heads, g key/value heads, r = h/g, N queries, M keys, d and e widths of
keys and values. S̄ and D̄ are held as [e + 1, d] a head. A chunk is c tokens of n = some elements of
the batch times some heads; the r query heads of a group come one after the other.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ENTRIES = 1 << 18  # of the workspace, which holds a chunk of K and of K̇, or of P and Ṗ

_Chunk = tuple[slice, slice, slice]  # elements of the batch, heads, tokens

_threshold_backward = torch.ops.aten.threshold_backward


def forward(q: Tensor, k: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return O [B, h, N, e] and the sums over the keys, S̄ [B, g, e + 1, d].

    Args:
        q: [B, h, N, d].
        k: [B, g, M, d].
        v: [B, g, M, e].
        eps: added to the denominator.
    """
    sums, _ = _sum_keys(k, v, None, None, None)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    space = _workspace(q)
    for q_m, out_m in zip(*(_members(t, k.shape[1]) for t in (q, out)), strict=True):
        for chunk in _chunks(q_m):
            S, z = _of_heads(sums, chunk)
            P, _ = _in(space, q_m[chunk])
            _normalise(_relu(q_m[chunk], P), z, eps)
            _store(torch.bmm(P, S.mT, out=_accumulator(out_m[chunk])), out_m[chunk])
    return out, sums


def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O, Ȯ [B, h, N, e] and S̄; tangents as their primals, not all of them None."""
    # Of eight bits, for V - c to be exact: one rounding of c in all keys would add up.
    working = _working_dtype(v)
    centre = v.mean(2, keepdim=True, dtype=working).bfloat16().to(working)
    apart, sums_t = _sum_keys(k, v, k_t, v_t, centre)
    sums = apart.clone()
    sums[:, :, :-1].addcmul_(centre.mT, apart[:, :, -1:])
    out, out_t = (q.new_empty(*q.shape[:3], v.shape[3]) for _ in range(2))
    groups, space = k.shape[1], _workspace(q)
    tangents = (None,) * (q.shape[1] // groups) if q_t is None else _members(q_t, groups)
    members = (_members(t, groups) for t in (q, out, out_t))
    for q_m, out_m, out_t_m, q_t_m in zip(*members, tangents, strict=True):
        for chunk in _chunks(q_m):
            (S, z), (S_apart, _) = _of_heads(sums, chunk), _of_heads(apart, chunk)
            S_t, z_t = (None, None) if sums_t is None else _of_heads(sums_t, chunk)
            P, P_t = _in(space, q_m[chunk])
            inverse = _normalise(_relu(q_m[chunk], P), z, eps)
            _store(torch.bmm(P, S.mT, out=_accumulator(out_m[chunk])), out_m[chunk])
            tangent = _accumulator(out_t_m[chunk])
            if q_t_m is None and k_t is None:
                tangent.zero_()
            else:
                q_t_i = None if q_t_m is None else q_t_m[chunk]
                mean = _differentiate(P, inverse, z, q_t_i, z_t, P_t)
                torch.bmm(P_t, S_apart.mT, out=tangent)
                lost = inverse * eps
                if lost.amax() > torch.finfo(lost.dtype).eps / 16:
                    tangent.baddbmm_(mean.mul_(lost), centre[chunk[:2]].flatten(0, 1))
            if S_t is not None:
                tangent.baddbmm_(P, S_t.mT)
            _store(tangent, out_t_m[chunk])
    return out, out_t, sums


def backward(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, grad_out: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq [B, h, N, d], dk [B, g, M, d] and dv [B, g, M, e] of the primal."""
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) for t in (q, k, v))
    grad_sums = torch.zeros_like(sums)
    groups, space = k.shape[1], _workspace(q, k)
    members = (_members(t, groups) for t in (q, grad_out, grad_q))
    for q_m, grad_out_m, grad_q_m in zip(*members, strict=True):
        for chunk in _chunks(q_m):
            S, z = _of_heads(sums, chunk)
            D, grad_z = _of_heads(grad_sums, chunk)
            P, A = _in(space, q_m[chunk])
            inverse = _normalise(_relu(q_m[chunk], P), z, eps)
            G = _flat(grad_out_m[chunk])
            torch.bmm(G, S, out=A)
            delta = (P * A).sum(2, keepdim=True)
            D.baddbmm_(G.mT, P)
            grad_z.baddbmm_(delta.mT, P, alpha=-1)
            A.addcmul_(delta, z, value=-1).mul_(inverse)
            _store(_where_positive(P, A, A), grad_q_m[chunk])
    for chunk in _chunks(k):
        D, grad_z = _of_heads(grad_sums, chunk)
        K, grad_K = _in(space, k[chunk])
        _relu(k[chunk], K)
        torch.baddbmm(grad_z, _flat(v[chunk]), D, out=grad_K)
        _store(_where_positive(K, grad_K, grad_K), grad_k[chunk])
        V = _accumulator(grad_v[chunk])
        _store(torch.bmm(K, D.mT, out=V), grad_v[chunk])
    return grad_q, grad_k, grad_v


def _sum_keys(
    k: Tensor, v: Tensor, k_t: Tensor | None, v_t: Tensor | None, centre: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return S̄ and its tangent [B, g, e + 1, d], which is None where both tangents are.

    The values are taken relative to the centre [B, g, 1, e].
    """
    shape = (*k.shape[:2], v.shape[3] + 1, k.shape[3])
    sums = k.new_zeros(shape, dtype=_working_dtype(k))
    sums_t = None if k_t is None and v_t is None else torch.zeros_like(sums)
    space = _workspace(k)
    for chunk in _chunks(k):
        K, K_t = _in(space, k[chunk])
        V = _flat(v[chunk])
        if centre is not None:
            V = V - centre[chunk[:2]].flatten(0, 1)
        _add(_of_heads(sums, chunk), V, _relu(k[chunk], K))
        if sums_t is None:
            continue
        S_t, z_t = _of_heads(sums_t, chunk)
        if k_t is not None:
            _add((S_t, z_t), V, _where_positive(K, k_t[chunk], K_t))
        if v_t is not None:
            S_t.baddbmm_(_flat(v_t[chunk]).mT, K)
    return sums, sums_t


def _add(sums: tuple[Tensor, Tensor], V: Tensor, K: Tensor) -> None:
    S, z = sums
    S.baddbmm_(V.mT, K)
    z.add_(K.sum(1, keepdim=True))


def _differentiate(
    P: Tensor, inverse: Tensor, z: Tensor, q_t: Tensor | None, z_t: Tensor | None, into: Tensor
) -> Tensor:
    """Write Ṗ [n, c, d] and return μ [n, c, 1]; q_t, or else z_t, is not None."""
    if q_t is None:
        assert z_t is not None
        mean = _rows(P, z_t)
        torch.mul(P, -mean, out=into)
        return mean
    _where_positive(P, q_t, into).mul_(inverse)
    mean = _rows(into, z)
    if z_t is not None:
        mean.add_(_rows(P, z_t))
    into.addcmul_(mean, P, value=-1)
    return mean


def _relu(t: Tensor, into: Tensor) -> Tensor:
    """Write relu(t) [n, c, d] in the working dtype."""
    return torch.clamp(_flat(t), min=0, out=into)


def _where_positive(condition: Tensor, t: Tensor, into: Tensor) -> Tensor:
    """Write t [n, c, d] in the working dtype, 0 where the condition is not above 0."""
    return _threshold_backward.grad_input(_flat(t), condition, 0, grad_input=into)


def _normalise(Q: Tensor, z: Tensor, eps: float) -> Tensor:
    """Divide the rows of Q [n, c, d] by Q z + eps in place; return the inverse [n, c, 1]."""
    inverse = _rows(Q, z).add_(eps).reciprocal_()
    Q.mul_(inverse)
    return inverse


def _rows(Q: Tensor, z: Tensor) -> Tensor:
    """Return Q z [n, c, 1]; torch is faster at the transpose of this product."""
    return (z @ Q.mT).mT


def _members(t: Tensor, groups: int) -> tuple[Tensor, ...]:
    """Split [B, h, N, w] into r times [B, g, N, w]."""
    return t.unflatten(1, (groups, -1)).unbind(2)


def _chunks(t: Tensor) -> Iterator[_Chunk]:
    """Chunks of [B, heads, tokens, d]: all tokens of several heads where they fit, else of one."""
    batch, heads, tokens, d = t.shape
    count = min(tokens, max(1, CHUNK_ENTRIES // (2 * d)))
    fitting = max(1, CHUNK_ENTRIES // (2 * d * count))
    elements, of_one = max(1, fitting // heads), min(fitting, heads)
    for element in range(0, batch, elements):
        for head in range(0, heads, of_one):
            for token in range(0, tokens, count):
                yield (
                    slice(element, min(element + elements, batch)),
                    slice(head, min(head + of_one, heads)),
                    slice(token, min(token + count, tokens)),
                )


def _workspace(*tensors: Tensor) -> Tensor:
    """Allocate what a chunk takes, flat: fresh memory at every chunk would fault in pages."""
    entries = max(t[next(_chunks(t))].numel() for t in tensors)
    return tensors[0].new_empty(2, entries, dtype=_working_dtype(tensors[0]))


def _in(space: Tensor, chunk: Tensor) -> tuple[Tensor, Tensor]:
    """Return two arrays [n, c, d] of the workspace for a chunk [b, heads, c, d]."""
    first, second = (t[: chunk.numel()].view(-1, *chunk.shape[2:]) for t in space)
    return first, second


def _of_heads(sums: Tensor, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    """Return Sᵀ [n, e, d] and zᵀ [n, 1, d] of a chunk's heads, as views."""
    found = sums[chunk[:2]].flatten(0, 1)
    return found[:, :-1], found[:, -1:]


def _flat(t: Tensor) -> Tensor:
    """[b, heads, c, w] -> [n, c, w] in the working dtype."""
    return t.to(_working_dtype(t)).reshape(-1, *t.shape[-2:])


def _accumulator(chunk: Tensor) -> Tensor:
    """Where a chunk [b, heads, c, w] of a result is computed [n, c, w]: itself, if wide enough."""
    if chunk.dtype == _working_dtype(chunk):
        return chunk.flatten(0, 1)
    return chunk.new_empty(chunk.shape, dtype=torch.float32).flatten(0, 1)


def _store(computed: Tensor, chunk: Tensor) -> None:
    if computed.data_ptr() != chunk.data_ptr():
        chunk.copy_(computed.view(chunk.shape))


def _working_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32
