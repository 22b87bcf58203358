"""Where the time of a derivative along a direction goes: a small DiT, and diffusers' Sana block.

    python benchmarks/profile_step.py [dit] [sana] [tokens=1024] [turns=5] [threads=1]

Both at batch 1, in float32. A part's time is what passes between its start and its end without that
of parts inside it: median over turns in which torch's own operations and ours alternate. `share` is
of the whole. `dit` shows a two-pass step of sCM, `sana` the pass with tangents of one block of
Sana-Sprint 0.6B (width 1152, 36 heads; 300 caption tokens).
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from small_dit import SmallDiT, loss, math_attention, plain_norm, tangents, trajectory
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stillhouse.diffusion.dual_operations import dual_operations
from stillhouse_kernels import attention, modulated_layer_norm, relu_linear_attention


class Clock:
    """Adds the time up that passes in each part, of nested parts in the innermost."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, part: str) -> None:
        """Begin a part."""
        self._book()
        self._open.append(part)

    def leave(self) -> None:
        """End the part that was begun last."""
        self._book()
        self._open.pop()

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, its time booked to the part."""

        @wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return run

    def watch(self, module: nn.Module, part: str) -> None:
        """Book the time of a module's calls to the part."""
        module.register_forward_pre_hook(lambda *_: self.enter(part))
        module.register_forward_hook(lambda *_: self.leave())

    def _book(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


Work = Callable[[bool, Clock], None]


def dit(tokens: int) -> tuple[Work, Callable[[Clock], None]]:
    """A two-pass step of sCM on the small DiT."""
    network = SmallDiT()
    x, v, t = trajectory(tokens)

    def work(ours: bool, clock: Clock) -> None:
        dual = clock.timed("tangent: attention", attention if ours else math_attention)
        norm = modulated_layer_norm if ours else plain_norm
        dual_norm = clock.timed("tangent: norm and modulation", norm)

        def tangent_pass() -> Tensor:
            with torch.no_grad():
                return torch.func.jvp(
                    lambda x, t: network(x, t, dual, dual_norm), (x, t), tangents(v, t)
                )[1]

        F_t = clock.timed("tangent: gelu, gates, residuals, embeddings", tangent_pass)()
        forward = partial(network, x, t, scaled_dot_product_attention, norm)
        clock.enter("gradient: forward")
        F = forward()
        clock.leave()
        clock.timed("gradient: backward", loss(F, F_t, x, v, t).backward)()

    def watch(clock: Clock) -> None:
        for block in network.blocks:
            for layer in (block.qkv, block.projection, block.inner, block.outer):
                # Only the pass with tangents is cut into parts.
                layer.register_forward_pre_hook(partial(_enter_under_tangent, clock))
                layer.register_forward_hook(partial(_leave_under_tangent, clock))

    return work, watch


def _enter_under_tangent(clock: Clock, module: nn.Module, args: Any) -> None:
    if not torch.is_grad_enabled():
        clock.enter("tangent: products of weights")


def _leave_under_tangent(clock: Clock, module: nn.Module, args: Any, out: Any) -> None:
    if not torch.is_grad_enabled():
        clock.leave()


def sana(tokens: int) -> tuple[Work, Callable[[Clock], None]]:
    """The pass with tangents through one block of Sana-Sprint 0.6B."""
    from diffusers.models.transformers.sana_transformer import SanaTransformerBlock

    width, side = 1152, round(tokens**0.5)
    block = SanaTransformerBlock(
        dim=width,
        num_attention_heads=36,
        attention_head_dim=32,
        num_cross_attention_heads=16,
        cross_attention_head_dim=72,
        cross_attention_dim=width,
        attention_bias=False,
        qk_norm="rms_norm_across_heads",
    ).eval()
    x, x_t = torch.randn(2, 1, side**2, width)
    caption = torch.randn(1, 300, width)
    c, c_t = torch.randn(2, 1, 6 * width)
    processors = {True: LinearAttention(), False: block.attn1.processor}

    def work(ours: bool, clock: Clock) -> None:
        processor = processors[ours]
        block.attn1.set_processor(_Timed(clock, "linear attention", processor))

        def run(x: Tensor, c: Tensor) -> Tensor:
            return block(x, None, caption, None, c, side, side)

        def jvp() -> None:
            way = dual_operations() if ours else sdpa_kernel(SDPBackend.MATH)
            with torch.no_grad(), way:
                torch.func.jvp(run, (x, c), (x_t, c_t))

        clock.timed("modulation, gates, residuals", jvp)()

    def watch(clock: Clock) -> None:
        clock.watch(block.ff, "feed-forward: gating")
        clock.watch(block.attn2, "cross-attention")
        for norm in (block.norm1, block.norm2):
            clock.watch(norm, "layer norms")
        for part in (block.attn1, block.attn2):
            for norm in (part.norm_q, part.norm_k):
                clock.watch(norm, "norms of queries and keys")
            for layer in (part.to_q, part.to_k, part.to_v, part.to_out[0]):
                clock.watch(layer, "products of weights")
        for layer in (block.ff.conv_inverted, block.ff.conv_point):
            clock.watch(layer, "products of weights")
        clock.watch(block.ff.conv_depth, "feed-forward: depthwise convolution")

    return work, watch


class LinearAttention:
    """A processor of diffusers that computes Sana's linear attention by our operation."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        if attn.norm_q is not None:
            q = attn.norm_q(q)
        if attn.norm_k is not None:
            k = attn.norm_k(k)
        heads = [t.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        out = relu_linear_attention(*heads).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


class _Timed:
    """A processor whose time is booked."""

    def __init__(self, clock: Clock, part: str, processor: Callable[..., Tensor]) -> None:
        self.clock, self.part, self.processor = clock, part, processor

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        return self.clock.timed(self.part, self.processor)(
            attn, hidden_states, encoder_hidden_states, attention_mask
        )


def main(arguments: list[str]) -> None:
    """Profile what was asked for and print a markdown table of each."""
    settings = {"tokens": 1024, "turns": 5, "threads": 1}
    given = dict(a.split("=", 1) for a in arguments if "=" in a)
    names = [a for a in arguments if "=" not in a] or list(PARTS)
    if unknown := [*(given.keys() - settings.keys()), *(set(names) - PARTS.keys())]:
        expected = ", ".join([*PARTS, *(f"{name}=" for name in settings)])
        sys.exit(f"error: {unknown[0]}: expected some of {expected}")
    settings |= {name: int(value) for name, value in given.items()}
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    for name in names:
        work, watch = PARTS[name](settings["tokens"])
        clock = Clock()
        watch(clock)
        times: dict[bool, list[dict[str, float]]] = {False: [], True: []}
        for turn in range(settings["turns"] + 1):
            for ours in times:
                clock.seconds.clear()
                work(ours, clock)
                if turn > 0:
                    times[ours].append(dict(clock.seconds))
        print(table(f"{name}, {settings['tokens']} tokens", times[False], times[True]), "\n")


def table(title: str, torchs: list[dict[str, float]], ours: list[dict[str, float]]) -> str:
    """Return a line a part, the longest with torch's operations first."""
    before, after = (
        {part: statistics.median(turn[part] for turn in turns) for part in turns[0]}
        for turns in (torchs, ours)
    )
    lines = [f"| {title} | share, torch's own | share, ours | speed |", "|---|---|---|---|"]
    for part in sorted(before, key=lambda part: -before[part]):
        shares = (times[part] / sum(times.values()) for times in (before, after))
        cells = [part, *(f"{share:.0%}" for share in shares), f"{before[part] / after[part]:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    whole = sum(before.values()) / sum(after.values())
    return "\n".join([*lines, f"| the whole | 100% | 100% | {whole:.2f} |"])


PARTS = {"dit": dit, "sana": sana}

if __name__ == "__main__":
    main(sys.argv[1:])
