"""Flow matching and denoising score matching: how a teacher is made where none can be had.

    L = w(t) mean_D (F(x_t, t) - (cos t ε - sin t x_0))²,    x_t = cos t x_0 + sin t ε

on TrigFlow's path. Two well-known objectives are this one with a sampler of times and a weighting:

| objective | times | w(t) |
|---|---|---|
| flow matching (2210.02747), |v - (ε - x_0)|² | tan t = s / (1 - s), s uniform | (sin t + cos t)² |
| EDM (2206.00364, eq. 8), λ(σ) |D - x_0|² | log tan t ~ N(P_mean - ln σ_d, P_std²) | 1 |

The first since F = κ v + ..., κ = 1 / (sin t + cos t); the second since λ(σ) c_out² = 1. Conditions
are dropped at random, so that the network can be guided (2207.12598).
"""

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from stillhouse.diffusion.times import TimeSampler, drawn
from stillhouse.diffusion.trigflow import noised, velocity
from stillhouse.errors import UserError
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.objectives.consistency import Weighting
from stillhouse.ranges import Share
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms


def denoising(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    *,
    times: TimeSampler,
    weighting: Weighting,
    condition_dropout: Share,
) -> LossTerms:
    """Return the loss, a mean over the samples; a teacher is not asked.

    Args:
        networks: the student is what learns.
        batch: data.
        phase: where training stands; not read.
        generator: of times, noise and drops, on the CPU.
        times: of `diffusion.times`.
        weighting: w(t).
        condition_dropout: share of samples that are trained without their condition.

    Raises:
        UserError: for a share that a network without unconditional samples cannot learn from, or
            that leaves those of one that has them untrained.
    """
    unconditional = getattr(networks.student, "unconditional", None)
    if unconditional is not None and unconditional != (condition_dropout > 0):
        raise UserError(
            f"method.condition_dropout={condition_dropout}, student.unconditional="
            f"{str(unconditional).lower()}: samples without a condition are either trained, so "
            "that the network can be guided, or unknown; expected a share above 0 with true, or 0 "
            "with false"
        )
    x_0 = batch.x_0
    t, noise = drawn(x_0, times, generator)
    dropped = torch.rand(len(x_0), generator=generator).to(x_0.device) < condition_dropout
    F = networks.student(noised(x_0, noise, t), t, batch.condition.dropped(dropped))
    losses = (F - velocity(x_0, noise, t)).square().flatten(1).mean(1) * weighting(t).to(F.dtype)
    return LossTerms(total=losses.mean())


def of_flow(t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Return w(t) of flow matching, 1 / κ²."""
    return (t.sin() + t.cos()).square()
