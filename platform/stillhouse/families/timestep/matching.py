"""What the distribution-matching methods have in common: a generator's loss, its fake score's loss.

A generator's loss is called with (networks, x_0, condition, guidance_scale, generator) and returns
one of each sample. That of `score_difference` is a surrogate, of which only the gradient counts:
neither teacher nor fake score is asked with a gradient, whatever they learn elsewhere.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from stillhouse.diffusion.guidance import GuidanceScale, check_dropout, guided
from stillhouse.diffusion.times import TimeSampler, drawn
from stillhouse.diffusion.trigflow import denoised, noised, velocity
from stillhouse.errors import UserError
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.rollouts import Rollout, samples
from stillhouse.objectives.consistency import Weighting as WeightOfTime
from stillhouse.objectives.distribution_matching import (
    Weighting,
    matching_gradient,
    surrogate_loss,
)
from stillhouse.ranges import Finite, Share
from stillhouse.records.diffusion import Condition, ImageBatch, TrigFlowNetwork
from stillhouse.records.losses import LossTerms

GeneratorLoss = Callable[[Networks, Tensor, Condition, Tensor, Generator], Float[Tensor, "B"]]


def score_difference(
    networks: Networks,
    x_0: Float[Tensor, "B ..."],
    condition: Condition,
    guidance_scale: Float[Tensor, "B"],
    generator: Generator,
    *,
    times: TimeSampler,
    weighting: Weighting,
    fake_guidance_scale: Finite | None = 1.0,
) -> Float[Tensor, "B"]:
    """Return a loss whose gradient is that of KL(student, teacher), weighted.

    Args:
        networks: teacher and fake score.
        x_0: samples of the student, with their gradient.
        condition: of each.
        guidance_scale: of the teacher, for each.
        generator: of times and noise, on the CPU.
        times: of `diffusion.times`.
        weighting: of `objectives.distribution_matching`.
        fake_guidance_scale: of the fake score; None for the teacher's.

    Raises:
        UserError: without teacher or fake score.
    """
    teacher, fake = both_scores(networks)
    t, noise = drawn(x_0, times, generator)
    own = guidance_scale
    if fake_guidance_scale is not None:
        own = torch.full_like(guidance_scale, fake_guidance_scale)
    with torch.no_grad():
        x_t = noised(x_0, noise, t)
        f_teacher = denoised(x_t, guided(teacher, x_t, t, condition, guidance_scale), t)
        f_fake = denoised(x_t, guided(fake, x_t, t, condition, own), t)
        g = matching_gradient(x_0, f_fake, f_teacher, t, weighting)
    return surrogate_loss(x_0, g)


def fake_score_loss(
    networks: Networks,
    x_0: Float[Tensor, "B ..."],
    condition: Condition,
    generator: Generator,
    *,
    times: TimeSampler,
    weighting: WeightOfTime,
    condition_dropout: Share = 0.0,
) -> Float[Tensor, "B"]:
    """Return w(t) mean_D (F_fake - (cos t ε - sin t x_0))², denoising of the student's samples.

    Args:
        networks: the fake score.
        x_0: samples of the student, without a gradient.
        condition: of each.
        generator: of times, noise and drops, on the CPU.
        times: of `diffusion.times`.
        weighting: `objectives.consistency.even` is ‖x_0 - f‖² / sin² t (EDM, rCM), `of_noise` the
            error of the predicted noise, `of_scaled_noise` the same times cos² t.
        condition_dropout: share of samples without their condition, so that it can be guided.

    Raises:
        UserError: without a fake score, and for drops that it does not know.
    """
    fake = fake_score_of(networks)
    check_dropout(fake, condition_dropout)
    t, noise = drawn(x_0, times, generator)
    dropped = torch.rand(len(x_0), generator=generator).to(x_0.device) < condition_dropout
    F = fake(noised(x_0, noise, t), t, condition.dropped(dropped))
    losses = (F - velocity(x_0, noise, t)).square().flatten(1).mean(1)
    return losses * weighting(t).to(F.dtype)


def of_noise(t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Return cos² t: ε_fake - ε = cos t (F_fake - dx/dt) (DMD2)."""
    return t.cos().square()


def of_scaled_noise(t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Return cos⁴ t: prediction and noise scaled by α = cos t (SwiftBrush's code)."""
    return t.cos().pow(4)


def both_scores(networks: Networks) -> tuple[TrigFlowNetwork, TrigFlowNetwork]:
    """Return teacher and fake score.

    Raises:
        UserError: naming the one that is not there.
    """
    if networks.teacher is None:
        raise UserError("teacher=null: distribution matching has one; expected teacher=denoiser")
    return networks.teacher, fake_score_of(networks)


def fake_score_of(networks: Networks) -> TrigFlowNetwork:
    """Return the fake score.

    Raises:
        UserError: without one.
    """
    if networks.fake_score is None:
        raise UserError(
            "stages.<stage>.family.fake_score=null: distribution matching follows the student's "
            "samples with one; expected fake_score@stages.<stage>.family.fake_score=full_copy, "
            "lora or pretrained, with + where the recipe has none"
        )
    return networks.fake_score


def critic(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    *,
    rollout: Rollout,
    guidance_scale: GuidanceScale,
    times: TimeSampler,
    weighting: WeightOfTime,
    condition_dropout: Share = 0.0,
) -> LossTerms:
    """Return the loss of a fake score that learns alone, a mean over the samples.

    Args:
        networks: student and fake score.
        batch: whose conditions are sampled; of its data only the shape is read.
        phase: where training stands.
        generator: of everything drawn, on the CPU.
        rollout: of `rollouts`, as the student's.
        guidance_scale: of `diffusion.guidance`, of a student conditioned on its scale.
        times, weighting, condition_dropout: as in `fake_score_loss`.
    """
    scale = guidance_scale(len(batch.x_0), generator).to(batch.x_0.device)
    with torch.no_grad():
        x_0 = samples(networks, batch, phase, generator, rollout, scale)
    losses = fake_score_loss(
        networks,
        x_0,
        batch.condition,
        generator,
        times=times,
        weighting=weighting,
        condition_dropout=condition_dropout,
    )
    return LossTerms(losses.mean())
