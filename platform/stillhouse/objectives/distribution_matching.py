"""Distribution matching: two denoisers' difference as the gradient of a sample.

Tianwei Yin et al., "One-step Diffusion with Distribution Matching Distillation", arXiv:2311.18828
(DMD); DMD2, arXiv:2405.14867; Zhengyi Wang et al., "ProlificDreamer", arXiv:2305.16213 (variational
score distillation). The gradient of KL(student, teacher), both noised to the time t, by a sample
x_0 is the difference of their scores; with f the denoisers, f_fake of what the student generates,

    g = w (f_fake - f_teacher)          L = mean_D (x_0 - (x_0 - g))² / 2,   dL/dx_0 = g / D

g without a gradient: L is a surrogate, whose value means nothing. Scores are
s = (cos t f - x_t) / sin² t, noise predictions ε = (x_t - cos t f) / sin t: descent by g, by
s_fake - s_teacher and by ε_teacher - ε_fake move a sample alike.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.diffusion.paths import along
from stillhouse.ranges import Positive

Weighting = Callable[[Tensor, Tensor, Tensor], Tensor]


def matching_gradient(
    x_0: Float[Tensor, "B ..."],
    f_fake: Float[Tensor, "B ..."],
    f_teacher: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    weighting: Weighting,
) -> Float[Tensor, "B ..."]:
    """Return g, 0 where it is not finite.

    Args:
        x_0: samples of the student.
        f_fake, f_teacher: of the noised samples, the teacher guided.
        t: of the noise.
        weighting: w, called with (x_0, f_teacher, t).
    """
    weights = along(weighting(x_0, f_teacher, t), x_0)
    return (weights * (f_fake - f_teacher)).nan_to_num(0, 0, 0)


def surrogate_loss(x_0: Float[Tensor, "B ..."], g: Float[Tensor, "B ..."]) -> Float[Tensor, "B"]:
    """Return a loss of each sample whose gradient is g / D; its value is |g|² / 2D."""
    target = (x_0 - g).detach()
    return (x_0 - target).square().flatten(1).mean(1) / 2


def by_teacher_error(
    x_0: Float[Tensor, "B ..."],
    f_teacher: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    *,
    least: Positive = 1e-5,
) -> Float[Tensor, "B"]:
    """Return 1 / mean|x_0 - f_teacher| of each sample (DMD eq. 8, DMD2, rCM).

    Args:
        x_0, f_teacher, t: of a weighting.
        least: what the mean is never taken to be below.
    """
    return 1 / (x_0 - f_teacher).abs().flatten(1).mean(1).clamp_min(least)


def of_variance(
    x_0: Float[Tensor, "B ..."], f_teacher: Float[Tensor, "B ..."], t: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Return cos t sin t: g = sin² t (ε_teacher - ε_fake) (SwiftBrush, w(t) = σ²)."""
    return t.cos() * t.sin()


def plain(
    x_0: Float[Tensor, "B ..."], f_teacher: Float[Tensor, "B ..."], t: Float[Tensor, "B"]
) -> Float[Tensor, "B"]:
    """Return 1."""
    return torch.ones_like(t)
