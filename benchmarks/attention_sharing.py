"""Bodies whose layers share attention against the same bodies unshared: measured and counted.

    python benchmarks/attention_sharing.py [prefill] [decode] [training] [followers=2,3] [turns=9]
        [threads=2] [seconds=60] [contexts=512,2048] [decode_contexts=512,2048,8192] [batches=1,4]
        [eager=512] [layers=6] [shape=2048,5632,32,4]

Without a name, all three run. Six layers of TinyLlama's shape in float32 with random weights, no
embedding and no head: those cost the same on both sides, and under six layers they would weigh four
times what they do under TinyLlama's 22. The first s layers after layer 1 follow it: 2 of 6 (33%)
and 3 of 6 (50%) lie on either side of the 41% of EchoAtt (2409.14595).

All sides take turns in one process; a turn's ratio is the other side's time over ours. A row stops
after `seconds`, with three turns at least and `turns` at most. Printed are median and quartiles.

`bound` is the ratio of the least times by `attention_counts`, at the rates measured first: F, a
large product; B, a large copy; E, exponentials in cache. The other side is torch's SDPA: of what
transformers has, the flash kernels need a GPU and flex_attention a compiler. Eager attention, the
paper's opponent (15% more tokens/s, 25% less training time at 41% of 22 layers with their head),
has rows of its own at the contexts `eager`, without a bound.

- prefill: N tokens, batch 1, into an empty cache;
- decode: one token behind a cache of N; each call meets the same cache, none grows;
- training: forward and backward from a random gradient, batch 1; then the same with AdamW's step
  (fused). Each side has gradients only in its turn, and moments all the time.
"""

import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from attention_counts import Call, Rates, Shape, Work, least_seconds
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from stillhouse.stages.runner import quiet_libraries
from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import sharing_of

FEWEST_TURNS = 3
DECODE_CALLS = 8

OTHERS = ("SDPA", "eager")

Numbers = tuple[int, ...]
Turn = dict[str, Sequence[float]]


@dataclass(frozen=True)
class Settings:
    """What the command line changes."""

    followers: Numbers = (2, 3)
    turns: int = 9
    threads: int = 2
    seconds: float = 60.0
    contexts: Numbers = (512, 2048)
    decode_contexts: Numbers = (512, 2048, 8192)
    batches: Numbers = (1, 4)
    eager: Numbers = (512,)
    layers: int = 6
    shape: Numbers = (2048, 5632, 32, 4)

    @property
    def unshared(self) -> Shape:
        """The body whose layers all compute their own A."""
        width, inner, heads, kv_heads = self.shape
        leaders = tuple(range(self.layers))
        return Shape(leaders, width, inner, heads, kv_heads, width // heads)


@dataclass(frozen=True)
class Side:
    """A body and what it costs by counting."""

    name: str
    body: Any
    shape: Shape


@dataclass(frozen=True)
class Row:
    """One work, done by every side.

    Attributes:
        work: what is done.
        run: do it once with a side; the seconds of its parts.
        parts: names of the parts; each is measured with those before it.
        counted: the operators of a part at a shape.
        eager: whether the eager body does it too.
    """

    work: str
    run: Callable[[Side], Sequence[float]]
    parts: tuple[str, ...]
    counted: Callable[[str, Shape], Iterator[Work]]
    eager: bool


def sides(settings: Settings) -> list[Side]:
    """Return the unshared body, eager's, and one for every number of followers; weights are one."""
    s, layers = settings.unshared, settings.layers
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=s.width,
        intermediate_size=s.inner,
        num_hidden_layers=layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        max_position_embeddings=1 << 20,
    )
    full, eager = (LlamaForCausalLM(copy.deepcopy(config)) for _ in range(2))
    eager.load_state_dict(full.state_dict(), assign=True)
    full.set_attn_implementation("sdpa")
    eager.set_attn_implementation("eager")
    made = [Side("SDPA", full.model, s), Side("eager", eager.model, s)]
    for count in settings.followers:
        sharing = sharing_of(range(2, 2 + count), layers, key="followers")
        student: Any = share_attention(full, sharing, where="unshared")
        name = f"{count} of {layers}"
        made.append(Side(name, student.model, replace(s, leaders=sharing.leaders)))
    return [replace(side, body=side.body.eval()) for side in made]


def prefill(settings: Settings, made: Sequence[Side]) -> Iterator[Row]:
    """N tokens into an empty cache."""
    for N in settings.contexts:
        x = torch.randn(1, N, settings.unshared.width)

        def run(side: Side, x: Tensor = x) -> list[float]:
            cache = DynamicCache(config=side.body.config)
            return [inference(side, x, cache)]

        counted = partial(inference_works, 1, N, N)
        yield Row(f"prefill, N {N}", run, ("",), counted, N in settings.eager)


def decode(settings: Settings, made: Sequence[Side]) -> Iterator[Row]:
    """One token behind a filled cache."""
    for N in settings.decode_contexts:
        for batch in settings.batches:
            x = torch.randn(batch, 1, settings.unshared.width)
            filled = {side.name: filled_cache(side, batch, N) for side in made}

            def run(
                side: Side, x: Tensor = x, filled: dict[str, DynamicCache] = filled
            ) -> list[float]:
                # One call is short: a hiccup of the machine would decide a turn.
                again = [same_cache(filled[side.name]) for _ in range(DECODE_CALLS)]
                return [sum(inference(side, x, again.pop()) for _ in range(DECODE_CALLS))]

            counted = partial(inference_works, batch, 1, N + 1)
            work = f"decode, N {N}, batch {batch}"
            yield Row(work, run, ("",), counted, N in settings.eager)


def training(settings: Settings, made: Sequence[Side]) -> Iterator[Row]:
    """Forward and backward, and AdamW's step."""
    optimizers: dict[str, torch.optim.Optimizer] = {}
    for N in settings.contexts:
        x, gradient = (torch.randn(1, N, settings.unshared.width) for _ in range(2))

        def run(side: Side, x: Tensor = x, gradient: Tensor = gradient) -> list[float]:
            weights = [p for n, p in side.body.named_parameters() if "embed" not in n]
            if side.name not in optimizers:
                optimizers[side.name] = torch.optim.AdamW(weights, lr=1e-6, fused=True)
            began = time.perf_counter()
            side.body(inputs_embeds=x, use_cache=False).last_hidden_state.backward(gradient)
            halfway = time.perf_counter()
            optimizers[side.name].step()
            ended = time.perf_counter()
            optimizers[side.name].zero_grad()
            return [halfway - began, ended - halfway]

        def counted(part: str, shape: Shape, N: int = N) -> Iterator[Work]:
            call = Call(shape, 1, N, N)
            yield from call.forward()
            yield from call.backward()
            if part:
                yield from call.update()

        parts = ("", ", with AdamW")
        yield Row(f"training step, N {N}", run, parts, counted, N in settings.eager)


def inference_works(batch: int, queries: int, keys: int, part: str, shape: Shape) -> Iterator[Work]:
    """Return the operators of a forward pass."""
    return Call(shape, batch, queries, keys).forward()


@torch.no_grad()
def inference(side: Side, x: Tensor, cache: DynamicCache) -> float:
    """Return the seconds of a forward pass that lengthens the cache."""
    began = time.perf_counter()
    side.body(inputs_embeds=x, past_key_values=cache, use_cache=True)
    return time.perf_counter() - began


def filled_cache(side: Side, batch: int, count: int) -> DynamicCache:
    """Return a cache of random keys and values; what they say does not matter."""
    cache, s = DynamicCache(config=side.body.config), side.shape
    for layer in range(len(s.leaders)):
        k, v = (torch.randn(batch, s.kv_heads, count, s.head_dim) for _ in range(2))
        # A follower's values stand in the place of keys, as its model puts them.
        cache.update(k, v[..., :0] if s.follows(layer) else v, layer)
    return cache


def same_cache(filled: DynamicCache) -> DynamicCache:
    """Return a cache of the same tensors; to lengthen it makes new ones."""
    again = copy.copy(filled)
    again.layers = [copy.copy(layer) for layer in filled.layers]
    return again


def measured_rates() -> Rates:
    """Return what this machine reaches in a large product, a large copy and exponentials."""
    a, small = torch.randn(2048, 2048), torch.randn(1 << 17)
    source = torch.empty(1 << 28, dtype=torch.uint8)
    target, into = torch.empty_like(source), torch.empty_like(small)

    def fastest(work: Callable[[], Any]) -> float:
        times = []
        for _ in range(9):
            began = time.perf_counter()
            work()
            times.append(time.perf_counter() - began)
        return min(times)

    product = fastest(lambda: a @ a)
    copied = fastest(lambda: target.copy_(source))
    exponentials = fastest(lambda: [torch.exp(small, out=into) for _ in range(100)])
    return Rates(
        flops=2 * a.shape[0] ** 3 / product,
        moved=2 * len(source) / copied,
        exps=100 * len(small) / exponentials,
    )


def take_turns(row: Row, takers: Sequence[Side], settings: Settings) -> list[Turn]:
    """Return the seconds of every turn, side by side; the first, which warms up, is left out."""
    for side in takers:
        row.run(side)
    turns: list[Turn] = []
    began = time.perf_counter()
    while len(turns) < FEWEST_TURNS or (
        len(turns) < settings.turns and time.perf_counter() - began < settings.seconds
    ):
        turns.append({side.name: row.run(side) for side in takers})
    return turns


def lines(row: Row, made: Sequence[Side], settings: Settings, rates: Rates) -> Iterator[str]:
    """Measure a row and yield its lines of the table."""
    takers = [side for side in made if side.name != "eager" or row.eager]
    turns = take_turns(row, takers, settings)
    others = [side for side in takers if side.name in OTHERS]
    ours = [side for side in takers if side.name not in OTHERS]
    for last, part in enumerate(row.parts):
        for other, side in itertools.product(others, ours):

            def total(turn: Turn, of: Side, last: int = last) -> float:
                return sum(turn[of.name][: last + 1])

            ratios = [total(turn, other) / total(turn, side) for turn in turns]
            low, speed, high = statistics.quantiles(ratios, n=4)
            cells = [row.work + part, side.name, other.name, str(len(turns))]
            cells += [f"{speed:.3f} ({low:.3f} to {high:.3f})", "", ""]
            if other.name == "SDPA":
                least = [least_seconds(row.counted(part, of.shape), rates) for of in (other, side)]
                bound = least[0] / least[1]
                cells[-2:] = [f"{bound:.3f}", f"{speed / bound:.2f}"]
            yield f"| {' | '.join(cells)} |"


def parsed(arguments: Sequence[str]) -> tuple[list[str], Settings]:
    """Return the parts asked for and the settings."""
    parts = [a for a in arguments if "=" not in a] or list(PARTS)
    kinds = {field.name: type(field.default) for field in fields(Settings)}
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    if unknown := [*(set(parts) - set(PARTS)), *(set(given) - set(kinds))]:
        expected = ", ".join([*PARTS, *(f"{name}=" for name in kinds)])
        sys.exit(f"error: {unknown[0]}: expected some of {expected}")
    changes: dict[str, Any] = {}
    for name, text in given.items():
        kind = kinds[name]
        numbers = tuple(int(n) for n in text.split(",") if n)
        changes[name] = numbers if kind is tuple else kind(text)
    return parts, Settings(**changes)


def main(arguments: Sequence[str]) -> None:
    """Measure what was asked for and print a markdown table, a row as soon as it is known."""
    parts, settings = parsed(arguments)
    quiet_libraries()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    rates = measured_rates()
    print(
        f"{settings.threads} threads: F {rates.flops / 1e9:.0f} GFLOP/s, B {rates.moved / 1e9:.1f} "
        f"GB/s, E {rates.exps / 1e9:.2f} G/s\n"
    )
    print("| work | followers | against | turns | speed | bound | speed / bound |")
    print("|---|---|---|---|---|---|---|")
    made = sides(settings)
    for part in parts:
        for row in PARTS[part](settings, made):
            for line in lines(row, made, settings, rates):
                print(line, flush=True)


PARTS = {part.__name__: part for part in (prefill, decode, training)}

if __name__ == "__main__":
    main(sys.argv[1:])
