"""Rows of logits to values and G, in few passes over blocks that fit in the cache.

With z = logits/τ, Q = softmax(z), D = Σ f(P, Q) and g = ∂f/∂Q,

    G = ∂D/∂z = Q (g - c),    c = <Q, g>

| divergence        | g                        | M               |
|-------------------|--------------------------|-----------------|
| `forward_kl`      | -P/Q, so G = Q - P       |                 |
| `reverse_kl`      | log Q/P                  |                 |
| `jsd`             | (1-β) log Q/M            | β P + (1-β) Q   |
| `skew_forward_kl` | -(1-α) P/M               | α P + (1-α) Q   |
| `skew_reverse_kl` | log Q/M - α Q/M          | (1-α) P + α Q   |
| `total_variation` | sign(Q - P) / 2          |                 |

A constant in g drops out. softmax's exponential is the fast one on a CPU (0.6 ns an entry where
`exp` takes 0.8), so both distributions come from it and lse from its largest entry. M is mixed in
probabilities, not in logarithms: where it underflows, so does what multiplies its logarithm.
"""

import torch
from torch import Tensor

from stillhouse_kernels.vocabulary_loss.settings import Settings, Shaping

BLOCK_ENTRIES = 1 << 19  # of logits that a thread works on together: 2 MB of float32


def rows_at_once(vocabulary: int) -> int:
    """How many rows make a block that the cache holds and that all threads share."""
    return max(1, BLOCK_ENTRIES * torch.get_num_threads() // vocabulary)


def shape_logits(x: Tensor, shaping: Shaping) -> None:
    """Turn products into logits in place: softcap(scale · x)."""
    if shaping.softcap is not None:
        x.mul_(shaping.scale / shaping.softcap).tanh_().mul_(shaping.softcap)
    elif shaping.scale != 1.0:
        x.mul_(shaping.scale)


def slope(logits: Tensor, shaping: Shaping) -> Tensor | None:
    """d softcap / dx at the capped logits, 1 - (logits / c)^2; None for 1."""
    if shaping.softcap is None:
        return None
    return (logits / shaping.softcap).square_().neg_().add_(1)


def dense_rows(
    s: Tensor, t: Tensor, settings: Settings, *, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return D(P, Q) of every row, and G in place of s.

    Args:
        s: the student's products [n, V]; overwritten by ∂D/∂(logits/τ) times the soft-cap's slope.
        t: the teacher's [n, V]; spoilt.
        settings: of the loss.
        gradient: whether G is wanted; without it s is spoilt.

    Returns:
        D [n]; G [n, V], which is s, or None.
    """
    values = s.new_empty(s.shape[0])
    height = rows_at_once(s.shape[1])
    scratch = s.new_empty(3, min(height, s.shape[0]), s.shape[1])
    for start in range(0, s.shape[0], height):
        block = slice(start, start + height)
        sb, tb = s[block], t[block]
        shape_logits(sb, settings.student)
        shape_logits(tb, settings.teacher)
        outer = slope(sb, settings.student) if gradient else None
        values[block] = tempered_rows(sb, tb, settings, scratch[:, : sb.shape[0]], gradient)
        if outer is not None:
            sb.mul_(outer)
    return values, s if gradient else None


def tempered_rows(
    s: Tensor, t: Tensor, settings: Settings, scratch: Tensor, gradient: bool
) -> Tensor:
    """D [n] of logits s, t [n, V]; s becomes G, t is spoilt, scratch [3, n, V] is used."""
    if settings.temperature != 1.0:
        s.mul_(1 / settings.temperature)
        t.mul_(1 / settings.temperature)
    q, p, _ = scratch.unbind()
    log_z_s, log_z_t = _softmax(s, q), _softmax(t, p)
    name, w = settings.divergence, settings.weight
    if name == "forward_kl":
        t.sub_(s)
        value = _expectation(p, t) + (log_z_s - log_z_t).squeeze(-1)
        if gradient:
            torch.sub(q, p, out=s)
        return value
    if name == "total_variation":
        torch.sub(q, p, out=t)
        value = t.abs().sum(-1).mul_(0.5)
        if gradient:
            _gradient(s, q, t.sign_().mul_(0.5))
        return value
    if name == "reverse_kl":
        c = _expectation(q, s.sub_(t))
        if gradient:
            _gradient(s, q, s, c)
        return c + (log_z_t - log_z_s).squeeze(-1)
    return _mixture_rows(name, w, (s.sub_(log_z_s), t.sub_(log_z_t)), scratch, gradient)


def _mixture_rows(
    name: str, w: float, logs: tuple[Tensor, Tensor], scratch: Tensor, gradient: bool
) -> Tensor:
    """D [n] of the divergences from M; logs are log Q, which becomes G, and log P."""
    (s, t), (q, p, m) = logs, scratch.unbind()
    torch.lerp(q, p, 1 - w if name == "skew_reverse_kl" else w, out=m)
    m.clamp_(min=torch.finfo(m.dtype).tiny)
    if name == "jsd":
        to_student = _expectation(q, s.sub_(m.log_()))
        if gradient:
            _gradient(s, q, s, to_student)
            s.mul_(1 - w)
        return w * _expectation(p, t.sub_(m)) + (1 - w) * to_student
    if name == "skew_forward_kl":
        value = _expectation(p, t.sub_(torch.log(m, out=s)))
        if gradient:  # G = (1-α) (Q Σ PQ/M - PQ/M)
            p.mul_(q).div_(m).mul_(1 - w)
            torch.mul(q, p.sum(-1, keepdim=True), out=s)
            s.sub_(p)
        return value
    assert name == "skew_reverse_kl"
    value = _expectation(q, s.sub_(torch.log(m, out=t)))
    if gradient:
        s.sub_(torch.div(q, m, out=p), alpha=w)
        _gradient(s, q, s)
    return value


def _softmax(z: Tensor, out: Tensor) -> Tensor:
    """Write softmax(z) [n, V] to out and return log Σ e^z [n, 1], from the largest entry."""
    torch.softmax(z, -1, out=out)
    return z.amax(-1, keepdim=True) - out.amax(-1, keepdim=True).log()


def _expectation(p: Tensor, ratio: Tensor) -> Tensor:
    """Σ p · ratio [n]; where p is 0, ratio counts as 0 and is set so if it matters."""
    value = torch.linalg.vecdot(p, ratio)
    if not value.isfinite().all():  # seldom: only then is another pass worth its time
        ratio.masked_fill_(p == 0, 0.0)
        value = torch.linalg.vecdot(p, ratio)
    return value


def _gradient(s: Tensor, q: Tensor, g: Tensor, c: Tensor | None = None) -> None:
    """Write G = Q (g - c) to s, which may be g; c is <Q, g>."""
    c = torch.linalg.vecdot(q, g) if c is None else c
    torch.sub(g, c.unsqueeze(-1), out=s)
    s.mul_(q)
