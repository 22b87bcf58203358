"""Generators as rows of a table: a role and a number of steps, its samples, and what they cost."""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.images import ImageData
from stillhouse.data.pictures.pictures import Split
from stillhouse.diffusion.guidance import guided
from stillhouse.diffusion.solvers import ddim, few_step, uniform_grid
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.students.denoiser_folders import load_denoiser, pipeline_index

# The row of real samples against real ones.
FLOOR = "floor"
Draw = Callable[[Tensor, Condition, torch.Generator], Tensor]


@dataclass(frozen=True)
class Sampler:
    """A generator with a number of steps.

    Attributes:
        draw: called with (noise, condition, generator of further noise).
        cost: `network_calls` of a sample, of which a guided teacher has two a step, and, of a
            network that was trained, `parameters`.
    """

    draw: Draw
    cost: Mapping[str, int]


@dataclass(frozen=True)
class Drawn:
    """What a generator drew for the conditions of the test split.

    Attributes:
        samples: [N, ...], normalised as the data are.
        cost: that of the sampler, and `latency_ms` of a single sample.
    """

    samples: Float[Tensor, "N ..."]
    cost: Mapping[str, float | int]


def samplers(
    role: str, path: str, *, steps: Sequence[int], guidance_scale: float
) -> dict[str, Sampler]:
    """Return a sampler for each number of steps, under `<role>@<steps>`.

    Args:
        role: of the model.
        path: of a pipeline's folder. A consistency model in it brings its own numbers of steps and
            its own scale.
        steps: of a flow that is integrated.
        guidance_scale: of a flow.
    """
    key = f"models.{role}"
    index = pipeline_index(path, key=key)
    network = load_denoiser(path, key=key).eval().requires_grad_(False).to(device())
    if not index["times"]:
        return flow_samplers(role, network, steps=steps, guidance_scale=guidance_scale)
    scale = float(index["guidance_scale"])
    return {
        f"{role}@{count}": Sampler(_jumping(network, times, scale), _cost(network, len(times)))
        for count, times in index["times"].items()
    }


def flow_samplers(
    role: str, network: nn.Module, *, steps: Sequence[int], guidance_scale: float
) -> dict[str, Sampler]:
    """Return samplers that integrate a flow; arguments as in `samplers`."""
    calls = 1 if guidance_scale == 1 else 2
    return {
        f"{role}@{count}": Sampler(
            _integrating(network, count, guidance_scale), _cost(network, calls * count)
        )
        for count in steps
    }


def drawn(sampler: Sampler, data: ImageData, *, seed: int, repeats: int) -> Drawn:
    """Sample for every condition of the test split, from fixed noise.

    Args:
        sampler: the generator.
        data: its test split.
        seed: of the noise.
        repeats: how often the latency is taken, whose median is kept.
    """
    generator = torch.Generator().manual_seed(seed)
    parts: list[Tensor] = []
    with torch.no_grad():
        for batch in data.evaluation_batches("test"):
            noise = torch.randn(batch.x_0.shape, generator=generator).to(device())
            condition = batch.condition.to(device())
            parts.append(sampler.draw(noise, condition, generator).cpu())
        one = next(data.evaluation_batches("test")).to(device())
        said = one.condition.first(1)

        def single() -> Tensor:
            return sampler.draw(one.x_0[:1], said, generator)

        single()
        times = [_milliseconds(single) for _ in range(repeats)]
    return Drawn(torch.cat(parts), {**sampler.cost, "latency_ms": statistics.median(times)})


def real_samples(data: ImageData, split: Split) -> ImageBatch:
    """Return all samples of a split as one batch."""
    batches: Iterator[ImageBatch] = data.evaluation_batches(split)
    whole = next(batches)
    for batch in batches:
        whole = ImageBatch(
            torch.cat([whole.x_0, batch.x_0]), whole.condition.joined(batch.condition)
        )
    return whole


def device() -> torch.device:
    """Where models are evaluated."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _jumping(network: Any, times: Sequence[float], scale: float) -> Draw:
    def draw(noise: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
        scales = torch.full((len(noise),), scale, dtype=torch.double, device=noise.device)
        return few_step(lambda x, t: network(x, t, condition, scales), noise, times, generator)

    return draw


def _integrating(network: Any, steps: int, scale: float) -> Draw:
    def draw(noise: Tensor, condition: Condition, generator: torch.Generator) -> Tensor:
        scales = torch.full((len(noise),), scale, dtype=torch.double, device=noise.device)
        return ddim(
            lambda x, t: guided(network, x, t, condition, scales), noise, uniform_grid(steps)
        )

    return draw


def _cost(network: nn.Module, calls: int) -> Mapping[str, int]:
    parameters = sum(p.numel() for p in network.parameters())
    return {"network_calls": calls, **({"parameters": parameters} if parameters else {})}


def _milliseconds(call: Callable[[], Tensor]) -> float:
    began = time.perf_counter()
    call().cpu()
    return 1000 * (time.perf_counter() - began)
