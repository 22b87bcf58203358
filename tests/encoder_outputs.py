"""Layers of encoders drawn at random, and losses between them text by text, in float64."""

import math

import torch
from torch import Tensor

from stillhouse.records.encoders import AttentionTap

LENGTHS = (5, 2, 4)
MASK = torch.arange(5) < torch.tensor(LENGTHS).unsqueeze(1)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tap(seed: int, heads: int = 2, width: int = 3) -> AttentionTap:
    texts, positions = MASK.shape
    return AttentionTap(*(draw(texts, heads, positions, width, seed=seed + i) for i in range(3)))


def padded(x: Tensor, dim: int, value: float) -> Tensor:
    """Append three positions to axis `dim`, and then a whole text, all of `value`."""
    longer = torch.cat([x, torch.full_like(x.narrow(dim, 0, 3), value)], dim)
    return torch.cat([longer, torch.full_like(longer[:1], value)])


def padded_tap(kept: AttentionTap, value: float) -> AttentionTap:
    return AttentionTap(*(padded(x, 2, value) for x in (kept.queries, kept.keys, kept.values)))


def kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of the rows of softmaxes, mean over all rows."""
    p, q = p.softmax(-1), q.softmax(-1)
    return (p * (p / q).log()).sum(-1).mean()


def scores(left: Tensor, right: Tensor) -> Tensor:
    """left rightᵀ / √E of [..., n, E]."""
    return torch.einsum("...nd,...md->...nm", left, right) / math.sqrt(left.shape[-1])


def slices(states: Tensor, heads: int) -> Tensor:
    """[n, D] -> [h, n, D/h]."""
    return torch.stack(states.chunk(heads, -1))


def mean_over_texts(loss_of_text) -> Tensor:
    """Return the mean of a function of (text, its number of tokens)."""
    return torch.stack([loss_of_text(b, n) for b, n in enumerate(LENGTHS)]).mean()
