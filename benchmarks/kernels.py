"""The kernels against what they replace: interleaved ratios and peak memory.

    python benchmarks/kernels.py [followers] [group] [loss] [peers] [tangent] [beside]
                                 [consistency] [attention_sweep] [chunk_sweep]
                                 [turns=5] [threads=2] [dtype=float32] [divergence=forward_kl]

Without a name, the first four run. Both sides of a row take turns in one process on inputs of the
same shapes. `speed` is the other side's time over ours: median and quartiles of the turns' ratios.
`memory` is what a side allocates at its peak beyond its inputs. `roofline` is the time that our
products and bytes would take at the rates of a large product and a large copy, measured first, over
our time.

On a CUDA device the same rows run there, in bfloat16 unless `dtype` says otherwise, and `auto`
takes the Triton kernels; eager attention is a further opponent. `peers` runs beside TRL and Liger
where they are installed.
"""

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rows import DEVICE, Row, Settings
from tangents import beside, consistency, tangent
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from stillhouse.objectives.divergences import named_divergence
from stillhouse_kernels import follower_attention, leader_attention, linear_divergence
from stillhouse_kernels.shared_attention import streaming

# The tests measure memory in the same way.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
from memory import peak_bytes

DEFAULT = ("followers", "group", "loss", "peers")


def followers(settings: Settings) -> Iterator[Row]:
    """One follower's forward, causal, against SDPA."""
    for N in (512, 1024, 2048, 4096):
        q, k, v = (settings.tensor(1, 8, N, 64, learnt=False) for _ in range(3))
        _, state = leader_attention(q, k, v, causal=True)
        half, size = 8 * N * N / 2, q.element_size()
        for name, other in opponents().items():
            yield Row(
                f"follower_attention, N {N}",
                name,
                lambda s=state, v=v: follower_attention(s, v),
                lambda q=q, k=k, v=v, other=other: other(q, k, v),
                flops=2 * half * 64,
                moved=half * size + 2 * v.numel() * size,
            )


def group(settings: Settings) -> Iterator[Row]:
    """A leader with three followers, forward and backward, against four attentions."""
    for N in (512, 1024, 2048):
        shared = [settings.tensor(1, 8, N, 64) for _ in range(6)]
        apart = [settings.tensor(1, 8, N, 64) for _ in range(12)]
        weights = [settings.tensor(1, 8, N, 64, learnt=False) for _ in range(4)]

        def ours(tensors: Sequence[Tensor] = shared, weights: Sequence[Tensor] = weights) -> None:
            q, k, *values = tensors
            out, state = leader_attention(q, k, values[0], causal=True)
            outs = [out, *(follower_attention(state, v) for v in values[1:])]
            torch.autograd.grad(outs, tensors, list(weights))

        for name, other in opponents().items():

            def theirs(
                tensors: Sequence[Tensor] = apart,
                weights: Sequence[Tensor] = weights,
                other: Callable[..., Tensor] = other,
            ) -> None:
                outs = [other(*tensors[i : i + 3]) for i in range(0, 12, 3)]
                torch.autograd.grad(outs, tensors, list(weights))

            yield Row(
                f"leader + 3 followers, forward and backward, N {N}",
                f"4 x {name}",
                ours,
                theirs,
                # 5 products forward and 10 backward, each 2 d N^2 / 2 a head.
                flops=15 * 8 * N * N * 64,
                moved=15 * shared[0].numel() * shared[0].element_size(),
            )


def opponents() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Causal attention as torch has it, and on a GPU as it is written out."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True)

    def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
        return scores.softmax(-1) @ v

    return {"SDPA": sdpa, "eager": eager} if DEVICE.type == "cuda" else {"SDPA": sdpa}


@dataclass(frozen=True)
class Heads:
    """Hidden states and heads of a student and a teacher, T tokens, width H, vocabulary V."""

    x: Tensor
    W: Tensor
    y: Tensor
    U: Tensor

    @classmethod
    def of(cls, settings: Settings, T: int, H: int, V: int) -> "Heads":
        """Return random ones whose logits have a deviation of 2."""
        x, W, y, U = (
            (settings.tensor(n, H, learnt=False) * scale).requires_grad_(learnt)
            for n, scale, learnt in ((T, 1, True), (V, 2 * H**-0.5, True)) * 2
        )
        return cls(x, W, y.detach(), U.detach())

    def backward(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of the student's two."""
        return torch.autograd.grad(loss, [self.x, self.W])

    @property
    def flops(self) -> float:
        """Four products: the teacher's logits, the student's, and its two gradients."""
        return 8.0 * self.x.shape[0] * self.x.shape[1] * self.W.shape[0]

    @property
    def moved(self) -> float:
        """Every input once, every gradient once."""
        return 2.0 * sum(t.numel() * t.element_size() for t in (self.x, self.W, self.y, self.U))


def fused(heads: Heads, **options: Any) -> tuple[Tensor, ...]:
    """Our loss and its gradients."""
    return heads.backward(linear_divergence(heads.x, heads.W, heads.y, heads.U, **options))


def materialised(heads: Heads, divergence: str) -> tuple[Tensor, ...]:
    """The loss from two whole logit matrices, by autograd."""
    log_q = linear(heads.x, heads.W).float().log_softmax(-1)
    log_p = linear(heads.y, heads.U).float().log_softmax(-1)
    measure = named_divergence(divergence, beta=0.5, alpha=0.1)
    return heads.backward(measure(log_q, log_p).mean())


def loss(settings: Settings) -> Iterator[Row]:
    """The loss and its gradients against materialised logits."""
    for V in (32_000, 128_256):
        heads = Heads.of(settings, T=2048, H=512, V=V)
        yield Row(
            f"linear_divergence, {settings.divergence}, V {V}",
            "materialised logits",
            partial(fused, heads, divergence=settings.divergence),
            partial(materialised, heads, settings.divergence),
            heads.flops,
            heads.moved,
        )


def peers(settings: Settings) -> Iterator[Row]:
    """The generalised JSD at β = 0.5 against other libraries' chunked ones."""
    for V in (32_000, 128_256):
        heads = Heads.of(settings, T=2048, H=512, V=V)
        ours = partial(fused, heads, divergence="jsd", beta=0.5)
        for name, theirs in installed_peers(heads).items():
            work = f"linear_divergence, jsd, V {V}"
            yield Row(work, name, ours, theirs, heads.flops, heads.moved)


def installed_peers(heads: Heads) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return the other libraries' loss and gradients, of those that are installed."""
    found: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
    if find_spec("trl") is not None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl() -> tuple[Tensor, ...]:
            arguments = (heads.x, heads.W, None, heads.y, heads.U, None, 0.5)
            return heads.backward(ChunkedDivergenceFunction.apply(*arguments)[0].mean())

        found["TRL's chunked JSD"] = trl
    if find_spec("liger_kernel") is not None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        labels = torch.zeros(heads.x.shape[0], dtype=torch.long, device=DEVICE)
        module = LigerFusedLinearJSDLoss(0.0, 1.0, compiled=DEVICE.type == "cuda")

        def liger() -> tuple[Tensor, ...]:
            return heads.backward(module(heads.x, heads.W, heads.y, heads.U, labels))

        found["Liger's chunked JSD"] = liger
    return found


def attention_sweep(settings: Settings) -> Iterator[Row]:
    """m layers' attention, forward: shared by stored A and by recomputation, against m calls."""
    for N, d, m in itertools.product((512, 1024, 2048, 4096, 8192), (64, 128), (2, 4, 8)):
        q, k, v = (settings.tensor(1, 8, N, d, learnt=False) for _ in range(3))
        half, size = 8 * N * N / 2, q.element_size()

        def shared(limit: int, q: Tensor = q, k: Tensor = k, v: Tensor = v, m: int = m) -> None:
            kept = streaming.STORED_BYTES_LIMIT
            streaming.STORED_BYTES_LIMIT = limit
            try:
                _, state = leader_attention(q, k, v, causal=True, backend="streaming")
                for _ in range(m - 1):
                    follower_attention(state, v)
            finally:
                streaming.STORED_BYTES_LIMIT = kept

        def apart(q: Tensor = q, k: Tensor = k, v: Tensor = v, m: int = m) -> None:
            for _ in range(m):
                scaled_dot_product_attention(q, k, v, is_causal=True)

        for way, limit, products in (("stored", 1 << 40, m + 1), ("recomputed", 0, 2 * m)):
            yield Row(
                f"{way} A, N {N}, d {d}, m {m}",
                f"{m} x SDPA",
                partial(shared, limit),
                apart,
                flops=products * 2 * half * d,
                moved=m * half * size * (way == "stored"),
            )


def chunk_sweep(settings: Settings) -> Iterator[Row]:
    """The loss at many chunk sizes, the bad end too, against materialised logits."""
    heads = Heads.of(settings, T=4096, H=512, V=32_000)
    for size in (8, 32, 64, 128, 256, 512, 1024, 4096):
        yield Row(
            f"linear_divergence, {settings.divergence}, V 32000, chunk_size {size}",
            "materialised logits",
            partial(fused, heads, divergence=settings.divergence, chunk_size=size),
            partial(materialised, heads, settings.divergence),
            heads.flops,
            heads.moved,
        )


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """Return the wall time of a call."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(repeats):
        function()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def peak(function: Callable[[], Any]) -> int:
    """Return the bytes that a call allocates at its peak beyond what was there before."""
    if DEVICE.type != "cuda":
        return peak_bytes(function)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() - before


def rates(settings: Settings) -> tuple[float, float]:
    """Return what this machine reaches: FLOP/s of a large product, bytes/s of a large copy."""
    a = settings.tensor(4096, 4096, learnt=False)
    source = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    product = min(seconds(lambda: a @ a) for _ in range(5))
    copy = min(seconds(lambda: target.copy_(source)) for _ in range(5))
    return 2 * a.shape[0] ** 3 / product, 2 * source.numel() / copy


def measure(row: Row, turns: int, flops_per_s: float, bytes_per_s: float) -> list[str]:
    """Return a line of the table."""
    memory = [peak(side) / 2**20 for side in (row.ours, row.theirs)]
    row.ours()
    # A turn of a fast call takes a tenth of a second, or a hiccup of the machine decides it.
    repeats = max(1, round(0.1 / seconds(row.theirs)))
    pairs = [(seconds(row.ours, repeats), seconds(row.theirs, repeats)) for _ in range(turns)]
    low, speed, high = statistics.quantiles([theirs / ours for ours, theirs in pairs], n=4)
    bound = max(row.flops / flops_per_s, row.moved / bytes_per_s)
    share = bound / statistics.median(ours for ours, _ in pairs)
    cells = [row.work, row.against, f"{speed:.2f} ({low:.2f} to {high:.2f})"]
    return [*cells, f"{memory[0]:.0f} / {memory[1]:.0f} MiB", f"{share:.0%}"]


def main(arguments: list[str]) -> None:
    """Measure what was asked for and print a markdown table, a row as soon as it is known."""
    parts = [a for a in arguments if "=" not in a] or list(DEFAULT)
    known = {field.name: type(field.default) for field in fields(Settings)}
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    if unknown := [*(set(parts) - set(PARTS)), *(set(given) - set(known))]:
        expected = ", ".join([*PARTS, *(f"{name}=" for name in known)])
        sys.exit(f"error: {unknown[0]}: expected some of {expected}")
    settings = Settings(**{name: known[name](value) for name, value in given.items()})
    if settings.turns < 2:
        sys.exit(f"error: turns={settings.turns}: expected at least 2, for the quartiles")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    flops_per_s, bytes_per_s = rates(settings)
    where = f"{settings.threads} threads"
    if DEVICE.type == "cuda":
        where = torch.cuda.get_device_name()
    print(f"{where}, {settings.dtype}:", end=" ")
    print(f"{flops_per_s / 1e9:.0f} GFLOP/s, {bytes_per_s / 1e9:.0f} GB/s\n")
    print("| work | against | speed | memory, ours / theirs | roofline |")
    print("|---|---|---|---|---|")
    for part in parts:
        for row in PARTS[part](settings):
            cells = measure(row, settings.turns, flops_per_s, bytes_per_s)
            print(f"| {' | '.join(cells)} |", flush=True)


PARTS = {
    part.__name__: part
    for part in (
        *(followers, group, loss, peers),
        *(tangent, beside, consistency, attention_sweep, chunk_sweep),
    )
}

if __name__ == "__main__":
    main(sys.argv[1:])
