"""TBCM: consistency distillation on the teacher's own trajectories, without data.

"TBCM: Trajectory-Backward Consistency Model", arXiv:2511.20410. The teacher, guided, runs from pure
noise to a sample; every place that it comes through is a state for the consistency loss, with the
velocity that it went on with. No picture is needed, and states are those that sampling meets: a
guided teacher's paths do not lead through noised data.

    u_i, i < n     the teacher's own grid of times (`solvers.flow_grid`)
    t_0 = π/2,  t_{i+1} ~ U(u_{i+1}, u_i)                    one time in each gap
    x_{i+1} = cos d x_i - sin d F_w(x_i, t_i),   d = t_i - t_{i+1}        the last step goes to 0
    L at the states 1 .. n - 1: at pure noise the tangent is 0
    r = min(1, update / H), and after `calm_down` falls to r_end

States of one trajectory are correlated: it takes many. A trajectory may be left out by how it ends;
the paper leaves out those of a guided teacher that go black, with probability 1 - |x_0 - black|²/D.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from stillhouse.diffusion.guidance import GuidanceScale, guided
from stillhouse.diffusion.solvers import all_at, ddim, flow_grid
from stillhouse.errors import UserError
from stillhouse.families.timestep.consistency import ConsistencyLoss, States, warmed
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.ranges import Count, CountFrom0, CountFrom2, Finite, Positive, Share
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms

LeftOut = Callable[[Float[Tensor, "B ..."]], Float[Tensor, "B"]]


def tbcm(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    *,
    loss: ConsistencyLoss,
    guidance_scale: GuidanceScale,
    steps: CountFrom2 = 16,
    shift: Positive = 2.5,
    trajectories: Count | None = None,
    left_out: LeftOut | None = None,
    warmup_steps: CountFrom0 = 0,
    calm_down_from: CountFrom0 | None = None,
    calm_down_steps: Count = 2000,
    calm_down_to: Share = 0.75,
) -> LossTerms:
    """Return the loss, a mean over the states.

    Args:
        networks: student and teacher.
        batch: whose conditions are sampled; of the data only the shape is read.
        phase: where training stands.
        generator: of times, noise, scales and what is left out, on the CPU.
        loss: `consistency.consistency`, partial.
        guidance_scale: of `diffusion.guidance`; one for a whole trajectory.
        steps: n of the teacher; below 8 its samples are visibly off.
        shift: of the teacher's grid.
        trajectories: how many of the batch's conditions are run, the first ones; None for all.
        left_out: called with how trajectories end, returns the probability that each is left out.
        warmup_steps: H.
        calm_down_from, calm_down_steps, calm_down_to: after so many updates r falls, in so many, to
            r_end; None for never.

    Raises:
        UserError: without a teacher.
    """
    if networks.teacher is None:
        raise UserError("teacher=null: TBCM follows a teacher; expected teacher=denoiser")
    teacher = networks.teacher
    count = min(trajectories or len(batch.x_0), len(batch.x_0))
    condition = batch.condition.first(count)
    scale = guidance_scale(count, generator).to(batch.x_0.device)
    noise = torch.randn(batch.x_0[:count].shape, generator=generator).to(batch.x_0)
    visited: list[tuple[Tensor, float, Tensor]] = []
    with torch.no_grad():
        end = ddim(
            lambda x, t: guided(teacher, x, t, condition, scale),
            noise,
            route(flow_grid(steps, shift=shift), generator),
            lambda *state: visited.append(state),
        )
    kept = torch.ones(count, dtype=end.dtype)
    if left_out is not None:
        kept = (torch.rand(count, generator=generator) >= left_out(end).cpu()).to(end.dtype)
    inner = visited[1:]
    states = States(
        x_t=torch.cat([x for x, _, _ in inner]),
        t=torch.cat([all_at(x, t) for x, t, _ in inner]),
        velocity=torch.cat([F for _, _, F in inner]),
        condition=condition.repeated(len(inner)),
        guidance_scale=scale.repeat(len(inner)),
        kept=kept.to(end.device).repeat(len(inner)),
    )
    r = warmed(phase.update, warmup_steps)
    if calm_down_from is not None:
        r = min(r, calmed(phase.update, calm_down_from, calm_down_steps, calm_down_to))
    return loss(networks, states, r)


def route(grid: list[float], generator: Generator) -> list[float]:
    """Return π/2 and one time, evenly drawn, in every gap of a falling grid."""
    places = torch.rand(len(grid) - 1, generator=generator, dtype=torch.double).tolist()
    gaps = zip(grid[1:], grid, places, strict=False)
    return [math.pi / 2, *(low + place * (high - low) for low, high, place in gaps)]


def calmed(update: int, start: int, steps: int, end: float) -> float:
    """Return 1 until `start`, and from then on what falls to `end` in so many updates."""
    share = min(1.0, max(0.0, (update - start) / steps))
    return 1 - share * (1 - end)


def near(x_0: Float[Tensor, "B ..."], *, value: Finite) -> Float[Tensor, "B"]:
    """Return 1 - |x_0 - value|²/D, at least 0: how surely a sample is left out that is all black.

    Args:
        x_0: how trajectories end, as the data are normalised.
        value: of black, as the data are normalised.
    """
    return (1 - (x_0 - value).square().flatten(1).mean(1)).clamp_min(0)
