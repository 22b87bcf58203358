"""Samples of a student as its sampler meets them: all steps but the last without a gradient.

A rollout is called with (F, noise, turn, generator) and returns x_0 [B, ...]. F is the student;
`turn`, how often the phase has been before, decides how many steps are taken, alike on all ranks
and for all seeds. Between steps a sample is noised again, with fresh noise.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from stillhouse.data.stream import generator_for
from stillhouse.diffusion.solvers import Velocity, all_at, check_times
from stillhouse.diffusion.times import TimeSampler
from stillhouse.diffusion.trigflow import denoised, noised
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.ranges import Count
from stillhouse.records.diffusion import ImageBatch

Rollout = Callable[[Velocity, Tensor, int, Generator], Tensor]


def backward_simulation(
    F: Velocity,
    noise: Float[Tensor, "B ..."],
    turn: int,
    generator: Generator,
    *,
    times: Sequence[float],
) -> Float[Tensor, "B ..."]:
    """Return samples of the first k steps of a grid, k even over 1 .. N (DMD2).

    Args:
        F, noise, turn, generator: of a rollout.
        times: falling, the sampler's own; [π/2] is a generator of one step.
    """
    check_times(times, key="method.<phase>.rollout.times")
    steps = int(torch.randint(len(times), (), generator=generator_for(turn))) + 1
    grid = [all_at(noise, t) for t in times[:steps]]
    return _rolled(F, noise, grid, generator)


def falling(
    F: Velocity,
    noise: Float[Tensor, "B ..."],
    turn: int,
    generator: Generator,
    *,
    times: TimeSampler,
    most_steps: Count,
) -> Float[Tensor, "B ..."]:
    """Return samples of N steps at drawn times that fall from π/2, N in turn 1 .. most (rCM).

    Args:
        F, noise, turn, generator: of a rollout.
        times: of `diffusion.times`; a draw behind the time before it becomes that time.
        most_steps: the largest N; the paper draws N, its code takes it in turn.
    """
    grid = [all_at(noise, math.pi / 2)]
    for _ in range(turn % most_steps):
        drawn = times(len(noise), generator).to(noise.device)
        grid.append(torch.minimum(drawn, grid[-1]))
    return _rolled(F, noise, grid, generator)


def samples(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    rollout: Rollout,
    scale: Float[Tensor, "B"],
) -> Float[Tensor, "B ..."]:
    """Return the student's samples of a batch's conditions.

    Args:
        networks: the student.
        batch: whose conditions; of its data only the shape is read.
        phase: where training stands.
        generator: of all noise, on the CPU.
        rollout: how they are taken.
        scale: of guidance, for a student conditioned on it.
    """
    noise = torch.randn(batch.x_0.shape, generator=generator, dtype=batch.x_0.dtype)

    def velocity(x_t: Tensor, t: Tensor) -> Tensor:
        return networks.student(x_t, t, batch.condition, scale)

    return rollout(velocity, noise.to(batch.x_0.device), phase.turn, generator)


def _rolled(
    F: Velocity, noise: Tensor, grid: Sequence[Tensor], generator: Generator
) -> Float[Tensor, "B ..."]:
    x_t = noise
    with torch.no_grad():
        for t, after in itertools.pairwise(grid):
            x_0 = denoised(x_t, F(x_t, t), t)
            fresh = torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
            x_t = noised(x_0, fresh.to(noise.device), after)
    return denoised(x_t, F(x_t, grid[-1]), grid[-1])
