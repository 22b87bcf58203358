"""Rows of derivatives along a direction: attention, the parts beside it, and a step of training."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from rows import DEVICE, Row, Settings
from small_dit import (
    SmallDiT,
    math_attention,
    one_pass_step,
    plain_norm,
    trajectory,
    two_pass_step,
)
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from stillhouse_kernels import (
    attention,
    attention_jvp,
    modulated_layer_norm_jvp,
    relu_linear_attention_jvp,
)


def tangent(settings: Settings) -> Iterator[Row]:
    """Attention and its tangent against torch.func.jvp over explicit attention, and three SDPAs."""
    for N, causal in ((256, False), (1024, False), (4096, False), (1024, True), (4096, True)):
        q, k, v, *tangents = six = [settings.tensor(1, 8, N, 64, learnt=False) for _ in range(6)]
        hidden = torch.ones(N, N, dtype=torch.bool, device=DEVICE).triu(1)

        def explicit(
            q: Tensor, k: Tensor, v: Tensor, causal: bool = causal, hidden: Tensor = hidden
        ) -> Tensor:
            scores = q @ k.mT * q.shape[-1] ** -0.5
            return (scores.masked_fill(hidden, -torch.inf) if causal else scores).softmax(-1) @ v

        def three(q: Tensor = q, k: Tensor = k, v: Tensor = v, causal: bool = causal) -> None:
            for _ in range(3):
                scaled_dot_product_attention(q, k, v, is_causal=causal)

        others: dict[str, Callable[[], Any]] = {
            "torch.func.jvp": partial(torch.func.jvp, explicit, (q, k, v), tuple(tangents)),
            "3 x SDPA": three,
            **tangent_peers(six, causal),
        }
        for name, other in others.items():
            yield Row(
                f"attention_jvp, N {N}{', causal' if causal else ''}",
                name,
                partial(attention_jvp, *six, causal=causal),
                other,
                flops=12 * 8 * N * N * 64 / (1 + causal),
                moved=8 * q.numel() * q.element_size(),
            )


def tangent_peers(six: Sequence[Tensor], causal: bool) -> dict[str, Callable[[], Any]]:
    """Return the other library's kernel, where it is installed and there is a GPU for it."""
    if DEVICE.type != "cuda" or find_spec("jvp_flash_attention") is None:
        return {}
    from jvp_flash_attention.jvp_attention import attention as peer

    def run() -> None:
        torch.func.jvp(partial(peer, causal=causal), tuple(six[:3]), tuple(six[3:]))

    return {"jvp_flash_attention": run}


def beside(settings: Settings) -> Iterator[Row]:
    """What stands beside attention, and its tangent, against torch.func.jvp of the formula."""
    x, x_t = (settings.tensor(4, 1024, 384, learnt=False) for _ in range(2))
    rows = [settings.tensor(4, 384, learnt=False) for _ in range(4)]
    yield Row(
        "modulated_layer_norm_jvp, [4, 1024, 384]",
        "torch.func.jvp",
        partial(modulated_layer_norm_jvp, x, *rows[:2], x_t, *rows[2:]),
        partial(torch.func.jvp, plain_norm, (x, *rows[:2]), (x_t, *rows[2:])),
        flops=0.0,
        moved=4 * x.numel() * x.element_size(),
    )
    for h, N, d in ((36, 1024, 32), (8, 4096, 64)):
        six = [settings.tensor(1, h, N, d, learnt=False) for _ in range(6)]
        yield Row(
            f"relu_linear_attention_jvp, [1, {h}, {N}, {d}]",
            "torch.func.jvp",
            partial(relu_linear_attention_jvp, *six),
            partial(torch.func.jvp, plain_linear_attention, tuple(six[:3]), tuple(six[3:])),
            flops=12.0 * h * N * d * d,
            moved=8 * six[0].numel() * six[0].element_size(),
        )


def plain_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Sana's attention as diffusers writes it."""
    q, k = q.relu(), k.relu()
    sums = k.mT @ pad(v, (0, 1), value=1.0)
    out = q @ sums
    return out[..., :-1] / (out[..., -1:] + 1e-15)


def consistency(settings: Settings) -> Iterator[Row]:
    """A step of sCM on a small DiT against the same with attention that has a jvp in torch."""
    network = SmallDiT().to(DEVICE, getattr(torch, settings.dtype))
    parameters = sum(p.numel() for p in network.parameters() if p.ndim == 2)
    for N in (256, 1024, 4096):
        x, v, t = (part.to(DEVICE, getattr(torch, settings.dtype)) for part in trajectory(N))
        for name, step, products in (
            ("two-pass", two_pass_step, 5),
            ("one-pass", one_pass_step, 4),
        ):
            yield Row(
                f"sCM step, DiT 384 x 6, N {N}, {name}",
                "two-pass, math attention",
                partial(step, network, x, v, t, attention),
                partial(two_pass_step, network, x, v, t, math_attention),
                # Of every weight: forward and tangent, two gradients, and the second forward.
                flops=2.0 * N * parameters * products,
                moved=4.0 * parameters * x.element_size(),
            )
