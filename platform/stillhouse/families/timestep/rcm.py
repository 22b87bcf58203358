"""rCM: continuous-time consistency with distribution matching as a long-skip regulariser.

Kaiwen Zheng et al., "Large Scale Diffusion Distillation via Score-Regularized Continuous-Time
Consistency", arXiv:2510.08431. Consistency covers modes and blurs, since its error adds up from
data to noise; distribution matching supervises the whole jump, and sharpens:

    student     L = L_sCM + λ L_DMD(x_0),   x_0 a rollout of 1 to N steps at drawn times
    critic      mean_D (F_fake - dx/dt)² at noised rollouts (`matching.critic`), behind the warm-up

The paper sums squares over a sample's D elements and halves nothing: its λ L_DMD is 2 λ times
`matching`'s beside a mean. Its code says 100 L_sCM + L_DMD for λ = 0.01.
"""

import torch
from torch import Generator

from stillhouse.diffusion.guidance import GuidanceScale
from stillhouse.errors import UserError
from stillhouse.families.timestep.matching import GeneratorLoss
from stillhouse.families.timestep.networks import Networks, Phase, TimestepMethod
from stillhouse.families.timestep.rollouts import Rollout, samples
from stillhouse.ranges import CountFrom0, Weight
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms


def student(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    *,
    consistency: TimestepMethod,
    consistency_weight: Weight,
    rollout: Rollout,
    guidance_scale: GuidanceScale,
    matching: GeneratorLoss,
    matching_weight: Weight,
    matching_from: CountFrom0,
) -> LossTerms:
    """Return the student's loss, a mean over the samples.

    Args:
        networks: student, teacher and fake score.
        batch: data.
        phase: where training stands.
        generator: of everything drawn, on the CPU.
        consistency: L_sCM, `scm.scm`, partial.
        consistency_weight: 1; 0 leaves distribution matching alone.
        rollout: of `rollouts`.
        guidance_scale: of `diffusion.guidance`, of the teacher that is matched.
        matching: of `matching`, a loss of each sample.
        matching_weight: λ; 0 leaves consistency alone.
        matching_from: updates of consistency alone, its warm-up; not waited for without it.

    Raises:
        UserError: for two weights of 0.
    """
    if not consistency_weight and not matching_weight:
        raise UserError(
            "method.student: consistency_weight=0 and matching_weight=0 leave nothing to learn"
        )
    total, terms = torch.zeros((), device=batch.x_0.device), {}
    if consistency_weight:
        consistent = consistency(networks, batch, phase, generator)
        total = total + consistency_weight * consistent.total
        terms |= consistent.terms
    if matching_weight and (not consistency_weight or phase.update >= matching_from):
        scale = guidance_scale(len(batch.x_0), generator).to(batch.x_0.device)
        x_0 = samples(networks, batch, phase, generator, rollout, scale)
        matched = matching(networks, x_0, batch.condition, scale, generator).mean()
        total = total + 2 * matching_weight * matched
        terms["matching"] = matched.detach()
    return LossTerms(total, terms)
