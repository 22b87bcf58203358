"""FLOPs, bytes and exponentials of a Llama body whose layers share attention, by operator.

An operator takes at least max(FLOPs / F, bytes / B, exponentials / E) at the rates of a machine;
the sum over the operators, unshared over shared, is the speed-up that counting allows. Weights,
activations and caches move once an operator.

A layer is `alone` (computes A and hands it to nobody), a leader or a follower. A layer alone has
fused attention, which keeps nothing of A and rebuilds it in the backward pass: 2 products of
N x M x d a head forward and 5 backward. A group of m keeps A: m + 1 forward, 2 m + 2 backward. A
causal mask halves both. Elementwise work (norms, residuals, gates, rotary steps) counts by its
bytes.

Legend: T tokens of a batch, N queries and M keys a sequence, b bytes a number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """What a machine reaches: FLOP/s of products, bytes/s of memory, exponentials/s."""

    flops: float
    moved: float
    exps: float


@dataclass(frozen=True)
class Work:
    """One operator, or several that are alike in kind."""

    flops: float = 0.0
    moved: float = 0.0
    exps: float = 0.0

    def seconds(self, rates: Rates) -> float:
        """Return the least time."""
        return max(self.flops / rates.flops, self.moved / rates.moved, self.exps / rates.exps)


@dataclass(frozen=True)
class Shape:
    """A body, TinyLlama's widths by default; `leaders[l]` is the layer whose A layer l takes."""

    leaders: tuple[int, ...]
    width: int = 2048
    inner: int = 5632
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 64
    bytes_a_number: int = 4

    def follows(self, layer: int) -> bool:
        """Whether a layer takes another's A."""
        return self.leaders[layer] != layer

    def leads(self, layer: int) -> bool:
        """Whether another layer takes this one's A."""
        return self.leaders.count(layer) > 1

    def projections(self, layer: int) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of a layer's linear maps."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        own = [] if self.follows(layer) else [(self.width, queries), (self.width, keys)]
        inner = [(self.width, self.inner)] * 2 + [(self.inner, self.width)]
        return [*own, (self.width, keys), (queries, self.width), *inner]

    @property
    def parameters(self) -> int:
        """Of all layers and the last norm; no embedding, no head."""
        layers = range(len(self.leaders))
        maps = sum(i * o for layer in layers for i, o in self.projections(layer))
        return maps + (2 * len(self.leaders) + 1) * self.width

    @property
    def cache_bytes_a_token(self) -> int:
        """Keys and values; a follower has no keys."""
        tensors = sum(2 - self.follows(layer) for layer in range(len(self.leaders)))
        return tensors * self.kv_heads * self.head_dim * self.bytes_a_number


@dataclass(frozen=True)
class Call:
    """Sequences that go through a body: the last `queries` of `keys` tokens, causal."""

    shape: Shape
    batch: int
    queries: int
    keys: int

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.queries

    @property
    def pairs(self) -> int:
        """Entries of A that the mask leaves, all heads."""
        N, M = self.queries, self.keys
        return self.batch * self.shape.heads * (N * M - N * (N - 1) // 2)

    def linear(self, inputs: int, outputs: int) -> Work:
        """Return a product of activations and weights, or one of its two gradients."""
        T, numbers = self.tokens, inputs * outputs + self.tokens * (inputs + outputs)
        return Work(2.0 * T * inputs * outputs, self.shape.bytes_a_number * numbers)

    def product(self, *, kept: bool) -> Work:
        """Return a product with A or its gradient; `kept`: A comes from memory or goes there."""
        s = self.shape
        rows = s.heads * self.queries + s.kv_heads * self.keys
        numbers = self.batch * rows * s.head_dim + kept * self.pairs
        return Work(2.0 * self.pairs * s.head_dim, s.bytes_a_number * numbers)

    def elementwise(self, layer: int, *, norm: int, residual: int, gate: int) -> Iterator[Work]:
        """Yield what a layer moves beside its products; arguments: numbers moved for each."""
        s, T = self.shape, self.tokens
        for numbers in (norm * s.width, residual * s.width) * 2:
            yield Work(moved=s.bytes_a_number * T * numbers)
        yield Work(moved=s.bytes_a_number * T * gate * s.inner)
        if not s.follows(layer):
            turned = 2 * (s.heads + s.kv_heads) * s.head_dim
            yield Work(moved=s.bytes_a_number * T * turned)

    def forward(self) -> Iterator[Work]:
        """Yield the operators of all layers."""
        s = self.shape
        for layer in range(len(s.leaders)):
            yield from (self.linear(i, o) for i, o in s.projections(layer))
            yield from self.elementwise(layer, norm=2, residual=3, gate=3)
            if s.follows(layer):
                yield self.product(kept=True)
                continue
            yield self.product(kept=False)
            yield Work(exps=self.pairs, moved=s.leads(layer) * s.bytes_a_number * self.pairs)
            yield self.product(kept=False)

    def backward(self) -> Iterator[Work]:
        """Yield the operators of all layers' gradients: of inputs and weights."""
        s = self.shape
        for layer in range(len(s.leaders)):
            yield from (self.linear(i, o) for i, o in s.projections(layer) * 2)
            yield from self.elementwise(layer, norm=3, residual=3, gate=5)
            if s.follows(layer):  # dV, and its part of dP
                yield from (self.product(kept=True), self.product(kept=False))
            elif s.leads(layer):  # dV, dP, dQ, dK; A is read for dV and again for dS
                yield from (self.product(kept=kept) for kept in (True, True, False, False))
            else:  # S again, dV, dP, dQ, dK
                yield from (self.product(kept=False) for _ in range(5))
                yield Work(exps=self.pairs)

    def update(self) -> Iterator[Work]:
        """Yield AdamW's step: parameter, gradient and two moments read, all but one written."""
        yield Work(moved=7.0 * self.shape.bytes_a_number * self.shape.parameters)


def least_seconds(works: Iterator[Work] | Sequence[Work], rates: Rates) -> float:
    """Return the sum of the operators' least times."""
    return sum(work.seconds(rates) for work in works)
