"""SwiftBrush: one step by variational score distillation, without data.

Thuong Hoang Nguyen, Anh Tran, "SwiftBrush: One-Step Text-to-Image Diffusion Model with Variational
Score Distillation", arXiv:2312.05239; the gradient is ProlificDreamer's, arXiv:2305.16213. The fake
score is the teacher with adapters that learn; both are guided alike:

    x_0 = -F(ε, π/2)                              pure noise has no signal to divide by
    student     g = sin² t (ε_teacher - ε_fake)   (`matching.score_difference`)
    critic      cos⁴ t mean_D (F_fake - dx/dt)²   (`matching.critic`), a tenth without its condition

The paper's last time has a signal left, α = √0.0047; TrigFlow's has none, and so the map is -F. It
drops the condition of a whole batch at a time, here it is dropped sample by sample.
"""

from torch import Generator

from stillhouse.diffusion.guidance import GuidanceScale
from stillhouse.families.timestep.matching import GeneratorLoss
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.rollouts import Rollout, samples
from stillhouse.records.diffusion import ImageBatch
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
) -> LossTerms:
    """Return the student's loss, a mean over the samples.

    Args:
        networks: student, teacher and fake score.
        batch: whose conditions are sampled; of the data only the shape is read.
        phase: where training stands.
        generator: of everything drawn, on the CPU.
        rollout: of `rollouts`; `backward_simulation` with times=[π/2] is one step.
        matching: of `matching`, a loss of each sample.
        guidance_scale: of `diffusion.guidance`, of both scores.
    """
    scale = guidance_scale(len(batch.x_0), generator).to(batch.x_0.device)
    x_0 = samples(networks, batch, phase, generator, rollout, scale)
    return LossTerms(matching(networks, x_0, batch.condition, scale, generator).mean())
