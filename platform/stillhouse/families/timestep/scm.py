"""sCM: continuous-time consistency distillation, to one step or a few.

Cheng Lu, Yang Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
arXiv:2410.11081, in its distillation form, which SANA-Sprint (2503.09641) and rCM (2510.08431)
build on. Data are noised along TrigFlow's path, the frozen and guided teacher says where the path
goes, and the student's output is pulled so that it stays constant along it:

    x_t = cos t x_0 + sin t ε
    F_T = F(none) + w (F(condition) - F(none))                              the teacher
    g, L as in `objectives.consistency`, r = min(1, update / warmup_steps)

The loss has a constant value; what falls is the distance of samples.
"""

import torch
from torch import Generator

from stillhouse.diffusion.guidance import GuidanceScale, guided
from stillhouse.diffusion.times import TimeSampler, drawn
from stillhouse.diffusion.trigflow import noised
from stillhouse.errors import UserError
from stillhouse.families.timestep.consistency import ConsistencyLoss, States, warmed
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.ranges import CountFrom0
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms


def scm(
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
    *,
    loss: ConsistencyLoss,
    times: TimeSampler,
    guidance_scale: GuidanceScale,
    warmup_steps: CountFrom0,
) -> LossTerms:
    """Return the loss, a mean over the samples.

    Args:
        networks: student and teacher.
        batch: data.
        phase: where training stands.
        generator: of times, noise and scales, on the CPU.
        loss: `consistency.consistency`, partial.
        times: of `diffusion.times`, where on the path.
        guidance_scale: of `diffusion.guidance`, how strongly the teacher is guided.
        warmup_steps: updates until the whole tangent counts; 0 for at once.

    Raises:
        UserError: without a teacher.
    """
    if networks.teacher is None:
        raise UserError("teacher=null: sCM distils a teacher; expected teacher=denoiser")
    x_0 = batch.x_0
    t, noise = drawn(x_0, times, generator)
    scale = guidance_scale(len(x_0), generator).to(x_0.device)
    x_t = noised(x_0, noise, t)
    with torch.no_grad():
        F_T = guided(networks.teacher, x_t, t, batch.condition, scale)
    states = States(x_t, t, F_T, batch.condition, scale)
    return loss(networks, states, warmed(phase.update, warmup_steps))
