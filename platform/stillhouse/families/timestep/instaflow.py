"""InstaFlow: straighten a flow on its own pairs, then distil it to one step.

Xingchao Liu et al., "InstaFlow: One Step is Enough for High-Quality Diffusion-Based Text-to-Image
Generation", arXiv:2309.06380; reflow: Xingchao Liu et al., arXiv:2209.03003. The teacher's sampler,
without randomness, turns recorded noise ε into a sample x_0 (`stages.record_pairs`). With
x_s = (1 - s) x_0 + s ε:

    L_reflow  = mean |(ε - x_0) - v(x_s, s)|²,    s uniform       the pairing stays, s is redrawn
    L_distil  = D(x_0, ε - v(ε, 1))               on new pairs, which the straightened flow made

Time runs from data to noise here, as everywhere in this project; the papers' t is 1 - s, their
velocity -v. Direct distillation of a curved flow is `one_step` on the teacher's own pairs.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from stillhouse.diffusion.guidance import check_dropout
from stillhouse.diffusion.solvers import all_at
from stillhouse.diffusion.times import TimeSampler
from stillhouse.diffusion.trigflow import denoised, noised, velocity
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.objectives.consistency import Weighting
from stillhouse.ranges import Share
from stillhouse.records.diffusion import PairBatch
from stillhouse.records.losses import LossTerms

Similarity = Callable[[Float[Tensor, "B ..."], Float[Tensor, "B ..."]], Float[Tensor, "B"]]


def reflow(
    networks: Networks,
    batch: PairBatch,
    phase: Phase,
    generator: Generator,
    *,
    times: TimeSampler,
    weighting: Weighting,
    condition_dropout: Share = 0.0,
) -> LossTerms:
    """Return L_reflow, a mean over the pairs; a teacher is not asked.

    Args:
        networks: the student is the flow that is straightened.
        batch: pairs.
        phase: where training stands; not read.
        generator: of times and drops, on the CPU.
        times: of `diffusion.times`; `shifted_uniform` is the paper's.
        weighting: w(t); `denoising.of_flow` makes it the squared error of the velocity.
        condition_dropout: share of pairs without their condition, so that the straight flow can be
            guided too.

    Raises:
        UserError: for a share above 0 and a network without unconditional samples.
    """
    check_dropout(networks.student, condition_dropout)
    t = times(len(batch.x_0), generator).to(batch.x_0.device)
    dropped = torch.rand(len(batch.x_0), generator=generator).to(t.device) < condition_dropout
    condition = batch.condition.dropped(dropped)
    F = networks.student(noised(batch.x_0, batch.noise, t), t, condition)
    losses = (F - velocity(batch.x_0, batch.noise, t)).square().flatten(1).mean(1) * weighting(
        t
    ).to(F.dtype)
    return LossTerms(total=losses.mean())


def one_step(
    networks: Networks,
    batch: PairBatch,
    phase: Phase,
    generator: Generator,
    *,
    similarity: Similarity,
) -> LossTerms:
    """Return L_distil, a mean over the pairs; a teacher is not asked.

    Args:
        networks: the student is the one-step map.
        batch: pairs.
        phase: where training stands; not read.
        generator: not drawn from.
        similarity: D, called with (student's, teacher's) samples.
    """
    t = all_at(batch.noise, math.pi / 2)
    F = networks.student(batch.noise, t, batch.condition)
    return LossTerms(total=similarity(denoised(batch.noise, F, t), batch.x_0).mean())


def squared_error(
    ours: Float[Tensor, "B ..."], theirs: Float[Tensor, "B ..."]
) -> Float[Tensor, "B"]:
    """Return the mean squared error of each sample, the paper's first D."""
    return (ours - theirs).square().flatten(1).mean(1)
