"""SANA-Sprint: continuous-time consistency with latent adversarial distillation.

Junsong Chen et al., "SANA-Sprint: One-Step Diffusion with Continuous-Time Consistency
Distillation", arXiv:2503.09641. Consistency has no gradient at pure noise, where a sample of one
step begins; heads on the frozen teacher's features are a discriminator of jumps from there:

    t' = π/2 with probability p, else drawn;   x̂_0 = f(x_t', t')
    student     L = L_sCM + λ (-mean D(x̂_s, s))                            x̂_s: x̂_0 noised to s
    critic      (mean relu(1 - D(real_s)) + mean relu(1 + D(fake_s))) / 2

Fake ones for the heads are also real data under another sample's condition.
"""

import math

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from stillhouse.diffusion.guidance import GuidanceScale
from stillhouse.diffusion.times import TimeSampler, drawn
from stillhouse.diffusion.trigflow import denoised, noised
from stillhouse.errors import UserError
from stillhouse.families.timestep.networks import Networks, Phase, TimestepMethod
from stillhouse.objectives.adversarial import Adversarial
from stillhouse.ranges import Share, Weight
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.records.losses import LossTerms


def student(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    *,
    consistency: TimestepMethod,
    consistency_weight: Weight,
    times: TimeSampler,
    guidance_scale: GuidanceScale,
    adversarial: Adversarial,
    adversarial_weight: Weight,
    adversarial_times: TimeSampler,
    max_time_probability: Share,
) -> LossTerms:
    """Return the student's loss, a mean over the samples.

    Args:
        networks: student, teacher and discriminator.
        batch: data.
        phase: where training stands.
        generator: of everything drawn, on the CPU.
        consistency: L_sCM, `scm.scm`, partial.
        consistency_weight: 1; 0 leaves the adversary alone.
        times: of `diffusion.times`, t' that are drawn.
        guidance_scale: of `diffusion.guidance`, of a student conditioned on it.
        adversarial: of `objectives.adversarial`.
        adversarial_weight: λ; 0 leaves consistency alone.
        adversarial_times: of `diffusion.times`, s.
        max_time_probability: p.

    Raises:
        UserError: for two weights of 0, without teacher or discriminator.
    """
    if not consistency_weight and not adversarial_weight:
        raise UserError(
            "method.student: consistency_weight=0 and adversarial_weight=0 leave nothing to learn"
        )
    total, terms = torch.zeros((), device=batch.x_0.device), {}
    if consistency_weight:
        consistent = consistency(networks, batch, phase, generator)
        total = total + consistency_weight * consistent.total
        terms |= consistent.terms
    if adversarial_weight:
        x_0 = jumps(networks, batch, generator, times, guidance_scale, max_time_probability)
        s, noise = drawn(x_0, adversarial_times, generator)
        fake = discriminator_logits(networks, noised(x_0, noise, s), s, batch.condition)
        generator_loss = adversarial.generator(fake)
        total = total + adversarial_weight * generator_loss
        terms["adversarial"] = generator_loss.detach()
    return LossTerms(total, terms)


def critic(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    *,
    times: TimeSampler,
    guidance_scale: GuidanceScale,
    adversarial: Adversarial,
    adversarial_times: TimeSampler,
    max_time_probability: Share,
    misaligned: bool,
) -> LossTerms:
    """Return the heads' loss, a mean over all logits.

    Args:
        networks, batch, phase, generator: as in `student`.
        times, guidance_scale, adversarial, adversarial_times, max_time_probability: as in
            `student`.
        misaligned: whether real data under the condition of the sample before are fake ones too,
            where it is another one.
    """
    with torch.no_grad():
        x_0 = jumps(networks, batch, generator, times, guidance_scale, max_time_probability)
    s, noise = drawn(x_0, adversarial_times, generator)
    fake = discriminator_logits(networks, noised(x_0, noise, s), s, batch.condition)
    _, noise = drawn(x_0, adversarial_times, generator)
    x_s = noised(batch.x_0, noise, s)
    real = discriminator_logits(networks, x_s, s, batch.condition)
    if misaligned:
        others = batch.condition.rolled()
        wrong = batch.condition.differs(others)
        if wrong.any():
            where = wrong.nonzero().flatten()
            mismatched = discriminator_logits(networks, x_s[where], s[where], others.picked(where))
            fake = torch.cat([fake, mismatched])
    return LossTerms(adversarial.discriminator(fake, real))


def jumps(
    networks: Networks,
    batch: ImageBatch,
    generator: Generator,
    times: TimeSampler,
    guidance_scale: GuidanceScale,
    max_time_probability: float,
) -> Float[Tensor, "B ..."]:
    """Return f(x_t', t') of noised data, from pure noise with a probability."""
    t, noise = drawn(batch.x_0, times, generator)
    last = torch.rand(len(t), generator=generator).to(t.device) < max_time_probability
    t = t.masked_fill(last, math.pi / 2)
    scale = guidance_scale(len(t), generator).to(t.device)
    x_t = noised(batch.x_0, noise, t)
    return denoised(x_t, networks.student(x_t, t, batch.condition, scale), t)


def discriminator_logits(
    networks: Networks, x_s: Tensor, s: Float[Tensor, "B"], condition: Condition
) -> Float[Tensor, "B K"]:
    """Return the heads' logits, by the frozen teacher's features.

    Raises:
        UserError: without teacher or discriminator.
    """
    if networks.teacher is None or networks.discriminator is None:
        raise UserError(
            "stages.<stage>.family.discriminator=null: SANA-Sprint has heads on its teacher; "
            "expected a teacher, and +discriminator@stages.<stage>.family.discriminator="
            "convolutional_heads"
        )
    return networks.discriminator(networks.teacher, x_s, s, condition)
