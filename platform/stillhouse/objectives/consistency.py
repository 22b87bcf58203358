"""Continuous-time consistency: the tangent that pulls a network to the end of its path.

Cheng Lu, Yang Song, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models",
arXiv:2410.11081 (sCM), in TrigFlow with data of unit variance. A consistency function
f = cos t x_t - sin t F maps every x_t on a path to the path's end, df/dt = 0. With F⁻ the student
without a gradient, F_T the velocity of the teacher and J = dF⁻ along cos t sin t (F_T, 1):

    g = cos t df/dt = -cos² t (F⁻ - F_T) - r (cos t sin t x_t + J)        r warms up from 0 to 1

    ĝ = g / (|g| + c)                                                     of each sample
    L = w(t) e^{-u(t)} mean_D (F - F⁻ - ĝ)² + u(t)                        u learnt, or 0

The value of a sample's square is (|g| / (|g| + c))² / D whatever F is; its gradient is -2 ĝ/D · dF.
Where papers keep σ_d = 0.5 (`diffusion.paths`), their c is σ_d times the c here, for their g is σ_d
times this one: c = 0.1 there is 0.2 here.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from stillhouse.diffusion.paths import along

TangentForm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]
Weighting = Callable[[Tensor], Tensor]


def scm_tangent(
    F: Float[Tensor, "B ..."],
    F_T: Float[Tensor, "B ..."],
    x_t: Float[Tensor, "B ..."],
    J: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    r: float,
) -> Float[Tensor, "B ..."]:
    """Return g of sCM (its eq. 8 with the warm-up of Sec. 4.2): at r = 0 the teacher is its root.

    Args:
        F: of the student, without a gradient.
        F_T: of the teacher, at the same place.
        x_t: where.
        J: the student's derivative along cos t sin t (F_T, 1).
        t: times; float64.
        r: 0 to 1.
    """
    cos, sin = along(t.cos(), x_t), along(t.sin(), x_t)
    return -cos.square() * (F - F_T) - r * (cos * sin * x_t + J)


def rcm_tangent(
    F: Float[Tensor, "B ..."],
    F_T: Float[Tensor, "B ..."],
    x_t: Float[Tensor, "B ..."],
    J: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    r: float,
) -> Float[Tensor, "B ..."]:
    """Return g as rCM's code warms it up (2510.08431); arguments as in `scm_tangent`.

    -cos t √(1 - r² sin² t) (F - F_T) - (r cos t sin t x_t + J): equal to sCM's at r = 1. Below,
    the teacher is not its root.
    """
    cos, sin = along(t.cos(), x_t), along(t.sin(), x_t)
    pull = cos * (1 - r**2 * sin.square()).sqrt()
    return -pull * (F - F_T) - (r * cos * sin * x_t + J)


def normalised(g: Float[Tensor, "B ..."], c: float) -> Float[Tensor, "B ..."]:
    """Return g / (|g| + c), the norm over all of a sample."""
    return g / (along(g.flatten(1).norm(dim=1), g) + c)


def consistency_loss(
    F: Float[Tensor, "B ..."],
    g: Float[Tensor, "B ..."],
    weights: Float[Tensor, "B"],
    log_variance: Float[Tensor, "B"] | None,
) -> Float[Tensor, "B"]:
    """Return L of each sample.

    Args:
        F: of the student, with its gradient.
        g: normalised; where the student is pulled to, from where it is.
        weights: w(t).
        log_variance: u(t), learnt; None for 0.
    """
    square = (F - F.detach() - g.detach()).square().flatten(1).mean(1)
    weighted = weights.to(square.dtype) * square
    if log_variance is None:
        return weighted
    return weighted * torch.exp(-log_variance) + log_variance


def even(t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Return w = 1 (rCM)."""
    return torch.ones_like(t)


def by_noise(t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Return w = 1 / tan t, the ratio of data to noise (sCM, SANA-Sprint)."""
    return 1 / torch.tan(t)


def finite_rows(*tensors: Float[Tensor, "B ..."]) -> Bool[Tensor, "B"]:
    """Return which samples are free of NaN and infinity in all of them."""
    rows = [torch.isfinite(t.flatten(1)).all(1) for t in tensors]
    return torch.stack(rows).all(0)
