"""DMD2: distribution matching with a fake score of its own pace, and a discriminator.

Tianwei Yin et al., "Improved Distribution Matching Distillation for Fast Image Synthesis",
arXiv:2405.14867, on DMD, arXiv:2311.18828. The student's samples are pulled to where the teacher's
denoiser and that of the fake score, which is trained on them, agree; real data keep them sharp:

    x_0     a rollout of the student, its last step with a gradient      (`rollouts`)
    student     L = L_DM(x_0) + λ_g L_G(D(x_t', t'))                     (`matching`, `adversarial`)
    critic      L = L_fake(x_0) + λ_d L_D(D(x_t'), D(real x_t'))         more often: two time scales

D is a head on the fake score's features, which learns with it. The critic's samples are drawn anew
in each of its steps, the paper's first ones are the student's own; their law is the same.
"""

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from stillhouse.diffusion.guidance import GuidanceScale
from stillhouse.diffusion.times import TimeSampler, drawn
from stillhouse.diffusion.trigflow import noised
from stillhouse.families.timestep.matching import (
    GeneratorLoss,
    WeightOfTime,
    both_scores,
    fake_score_loss,
)
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.rollouts import Rollout, samples
from stillhouse.objectives.adversarial import Adversarial
from stillhouse.ranges import Weight
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.records.losses import LossTerms


def student(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    *,
    rollout: Rollout,
    matching: GeneratorLoss,
    guidance_scale: GuidanceScale,
    adversarial: Adversarial | None,
    adversarial_times: TimeSampler,
    adversarial_weight: Weight,
) -> LossTerms:
    """Return the student's loss, a mean over the samples.

    Args:
        networks: all of them; without a discriminator L_G is left out.
        batch: whose conditions are sampled.
        phase: where training stands.
        generator: of everything drawn, on the CPU.
        rollout: of `rollouts`.
        matching: of `matching`, a loss of each sample.
        guidance_scale: of `diffusion.guidance`, of the teacher.
        adversarial: of `objectives.adversarial`; None without a discriminator.
        adversarial_times: of `diffusion.times`, how far samples are noised for it.
        adversarial_weight: λ_g.
    """
    scale = guidance_scale(len(batch.x_0), generator).to(batch.x_0.device)
    x_0 = samples(networks, batch, phase, generator, rollout, scale)
    matched = matching(networks, x_0, batch.condition, scale, generator).mean()
    if networks.discriminator is None or adversarial is None:
        return LossTerms(matched, {"matching": matched.detach()})
    fake = discriminator_logits(networks, x_0, batch.condition, adversarial_times, generator)
    generator_loss = adversarial.generator(fake)
    return LossTerms(
        matched + adversarial_weight * generator_loss,
        {"matching": matched.detach(), "adversarial": generator_loss.detach()},
    )


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
    adversarial: Adversarial | None,
    adversarial_times: TimeSampler,
    adversarial_weight: Weight,
) -> LossTerms:
    """Return the loss of fake score and discriminator, a mean over the samples.

    Args:
        networks, batch, phase, generator: as in `student`; the batch's data are real ones.
        rollout, guidance_scale: as in `student`; of a student conditioned on its scale.
        times: of `diffusion.times`, of the fake score.
        weighting: of its error, of `matching` or `objectives.consistency`.
        adversarial, adversarial_times: as in `student`.
        adversarial_weight: λ_d.
    """
    scale = guidance_scale(len(batch.x_0), generator).to(batch.x_0.device)
    with torch.no_grad():
        x_0 = samples(networks, batch, phase, generator, rollout, scale)
    condition = batch.condition
    denoising = fake_score_loss(
        networks, x_0, condition, generator, times=times, weighting=weighting
    ).mean()
    if networks.discriminator is None or adversarial is None:
        return LossTerms(denoising, {"fake_score": denoising.detach()})
    fake = discriminator_logits(networks, x_0, condition, adversarial_times, generator)
    real = discriminator_logits(networks, batch.x_0, condition, adversarial_times, generator)
    discriminator_loss = adversarial.discriminator(fake, real)
    return LossTerms(
        denoising + adversarial_weight * discriminator_loss,
        {"fake_score": denoising.detach(), "discriminator": discriminator_loss.detach()},
    )


def discriminator_logits(
    networks: Networks,
    x_0: Float[Tensor, "B ..."],
    condition: Condition,
    times: TimeSampler,
    generator: Generator,
) -> Float[Tensor, "B K"]:
    """Return the discriminator's logits of noised samples, by the fake score's features."""
    assert networks.discriminator is not None
    t, noise = drawn(x_0, times, generator)
    _, fake = both_scores(networks)
    return networks.discriminator(fake, noised(x_0, noise, t), t, condition)
