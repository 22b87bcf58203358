"""Paths from data to noise, x_t = α(t) x_0 + σ(t) ε, and what networks on them predict.

Data are of unit variance, coordinate by coordinate on average, ε ~ N(0, I). Papers that scale data
to σ_d = 0.5 draw noise from N(0, σ_d² I): their x is σ_d times the x here, their F is the F here.

| path | α(t) | σ(t) | t | source |
|---|---|---|---|---|
| TRIGFLOW | cos t | sin t | 0 to π/2 | 2410.11081, Sec. 3 |
| RECTIFIED_FLOW | 1 - t | t | 0 to 1 | 2209.03003 |
| variance_preserving() | exp(-B(t)/2), B = ∫β | √(1 - α²) | 0 to 1 | 2011.13456, Sec. 3.4 |
| numbered() | √ᾱ(t) | √(1 - ᾱ) | 0 to T - 1 | 2006.11239, Sec. 2 |
| variance_exploding() | 1 | t | 0 to σ_max | 2206.00364 |

A network predicts a x_0 + b ε:

| prediction | a | b |
|---|---|---|
| sample | 1 | 0 |
| epsilon | 0 | 1 |
| v (2202.00512, eq. 9) | -σ/κ | α/κ, κ = √(α² + σ²) |
| flow, dx_t/dt | dα/dt | dσ/dt |

EDM's preconditioned network F_θ (2206.00364, eq. 7) predicts -v on its own path. TrigFlow's F is
both its flow and its v.

Times are float64 tensors, coefficients too, and all of them are differentiable: the schedule is
inside of what a tangent is taken of.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError

Times = Float[Tensor, "*batch"]
Coefficients = tuple[Times, Times]


@dataclass(frozen=True)
class Path:
    """x_t = α(t) x_0 + σ(t) ε.

    Attributes:
        alpha, sigma: of x_0 and of ε at times t.
        alpha_dot, sigma_dot: their derivatives.
        time_of_angle: the time at which σ/α is the tangent of the angle, in radians from 0 to π/2.
        last: the time of the most noise.
    """

    alpha: Callable[[Times], Times]
    sigma: Callable[[Times], Times]
    alpha_dot: Callable[[Times], Times]
    sigma_dot: Callable[[Times], Times]
    time_of_angle: Callable[[Times], Times]
    last: float

    def angle(self, t: Times) -> Times:
        """Return the TrigFlow time with the same ratio of noise to data."""
        return torch.atan2(self.sigma(t), self.alpha(t))

    def scale(self, t: Times) -> Times:
        """Return √(α² + σ²), the deviation of x_t for data of unit variance."""
        return torch.hypot(self.alpha(t), self.sigma(t))


Prediction = Callable[[Path, Times], Coefficients]


def sample(path: Path, t: Times) -> Coefficients:
    """The network predicts x_0."""
    return torch.ones_like(t), torch.zeros_like(t)


def epsilon(path: Path, t: Times) -> Coefficients:
    """The network predicts ε."""
    return torch.zeros_like(t), torch.ones_like(t)


def v(path: Path, t: Times) -> Coefficients:
    """The network predicts (α ε - σ x_0) / κ."""
    scale = path.scale(t)
    return -path.sigma(t) / scale, path.alpha(t) / scale


def flow(path: Path, t: Times) -> Coefficients:
    """The network predicts the velocity dx_t/dt at fixed x_0 and ε."""
    return path.alpha_dot(t), path.sigma_dot(t)


def edm(path: Path, t: Times) -> Coefficients:
    """The network predicts what EDM's c_out scales: v with the sign turned."""
    a, b = v(path, t)
    return -a, -b


TRIGFLOW = Path(
    alpha=torch.cos,
    sigma=torch.sin,
    alpha_dot=lambda t: -torch.sin(t),
    sigma_dot=torch.cos,
    time_of_angle=lambda angle: angle,
    last=math.pi / 2,
)
RECTIFIED_FLOW = Path(
    alpha=lambda t: 1 - t,
    sigma=lambda t: t,
    alpha_dot=lambda t: -torch.ones_like(t),
    sigma_dot=torch.ones_like,
    time_of_angle=lambda angle: angle.sin() / (angle.sin() + angle.cos()),
    last=1.0,
)


def variance_preserving(beta_min: float = 0.1, beta_max: float = 20.0) -> Path:
    """Return the path whose noise grows at the rate β(t) = β_min + t (β_max - β_min)."""
    if not 0 < beta_min <= beta_max:
        raise UserError(
            f"beta_min={beta_min}, beta_max={beta_max}: expected 0 < beta_min <= beta_max"
        )
    growth = beta_max - beta_min

    def rate(t: Times) -> Times:
        return beta_min + growth * t

    def integral(t: Times) -> Times:
        return beta_min * t + growth * t.square() / 2

    def alpha(t: Times) -> Times:
        return torch.exp(-integral(t) / 2)

    def sigma(t: Times) -> Times:
        return torch.sqrt(-torch.expm1(-integral(t)))

    def time_of_angle(angle: Times) -> Times:
        # B = -2 log cos(angle), with the digits of small angles.
        whole = -torch.log1p(-angle.sin().square())
        return 2 * whole / (beta_min + torch.sqrt(beta_min**2 + 2 * growth * whole))

    return Path(
        alpha=alpha,
        sigma=sigma,
        alpha_dot=lambda t: -alpha(t) * rate(t) / 2,
        sigma_dot=lambda t: alpha(t).square() * rate(t) / (2 * sigma(t)),
        time_of_angle=time_of_angle,
        last=1.0,
    )


def numbered(alphas_cumprod: Float[Tensor, "T"]) -> Path:
    """Return the path of T levels of noise that DDPM and Stable Diffusion count from 0.

    Between two levels log ᾱ is linear in t; clean data are one step before the first, at t = -1.

    Args:
        alphas_cumprod: ᾱ of each level, falling, between 0 and 1.

    Raises:
        UserError: for others; ᾱ = 0 is noise without data, of which no x_0 can be told.
    """
    first = torch.ones(1, dtype=torch.double)
    knots = torch.cat([first, alphas_cumprod.detach().double().cpu()]).log()
    if not (knots.isfinite().all() and (knots.diff() < 0).all()):
        raise UserError(
            f"alphas_cumprod: from {float(alphas_cumprod[0]):.4g} to "
            f"{float(alphas_cumprod[-1]):.4g}; expected falling numbers between 0 and 1"
        )

    def log_alphas(t: Times) -> tuple[Times, Times]:
        """Return log ᾱ and its slope."""
        table = knots.to(t.device)
        place = (t.detach().floor().long() + 1).clamp(0, len(knots) - 2)
        slope = table[place + 1] - table[place]
        return table[place] + (t + 1 - place) * slope, slope

    def alpha(t: Times) -> Times:
        return torch.exp(log_alphas(t)[0] / 2)

    def sigma(t: Times) -> Times:
        return torch.sqrt(-torch.expm1(log_alphas(t)[0]))

    def time_of_angle(angle: Times) -> Times:
        # log ᾱ = 2 log cos(angle), with the digits of small angles.
        wanted, table = torch.log1p(-angle.sin().square()), knots.to(angle.device)
        behind = torch.searchsorted(-table, -wanted.detach().contiguous())
        place = (behind - 1).clamp(0, len(knots) - 2)
        return place - 1 + (wanted - table[place]) / (table[place + 1] - table[place])

    return Path(
        alpha=alpha,
        sigma=sigma,
        alpha_dot=lambda t: alpha(t) * log_alphas(t)[1] / 2,
        sigma_dot=lambda t: -alpha(t).square() * log_alphas(t)[1] / (2 * sigma(t)),
        time_of_angle=time_of_angle,
        last=len(knots) - 2.0,
    )


def variance_exploding(sigma_max: float = 80.0) -> Path:
    """Return the path of EDM, whose time is the noise's deviation, in that of the data."""
    if not sigma_max > 0:
        raise UserError(f"sigma_max={sigma_max}: expected a number above 0")
    return Path(
        alpha=torch.ones_like,
        sigma=lambda t: t,
        alpha_dot=torch.zeros_like,
        sigma_dot=torch.ones_like,
        time_of_angle=torch.tan,
        last=sigma_max,
    )


def add_noise(path: Path, x_0: Tensor, noise: Tensor, t: Float[Tensor, "B"]) -> Tensor:
    """Return x_t, of x_0's shape and dtype."""
    alpha, sigma = (along(c(t.double()), x_0) for c in (path.alpha, path.sigma))
    return alpha * x_0 + sigma * noise


def ends(
    path: Path, prediction: Prediction, x_t: Tensor, output: Tensor, t: Float[Tensor, "B"]
) -> tuple[Tensor, Tensor]:
    """Return x_0 and ε of a network's output; either may be infinite where it is not determined.

    Args:
        path, prediction: of the network.
        x_t: [B, ...].
        output: what the network says of it.
        t: its times.
    """
    t = t.double()
    alpha, sigma = path.alpha(t), path.sigma(t)
    a, b = prediction(path, t)
    whole = alpha * b - sigma * a
    x_0 = along(b / whole, x_t) * x_t - along(sigma / whole, x_t) * output
    noise = along(alpha / whole, x_t) * output - along(a / whole, x_t) * x_t
    return x_0, noise


def convert(
    path: Path,
    x_t: Tensor,
    output: Tensor,
    t: Float[Tensor, "B"],
    *,
    given: Prediction,
    wanted: Prediction,
) -> Tensor:
    """Return what another network would say: an output in another prediction.

    Args:
        path: of both.
        x_t: [B, ...].
        output: the network's.
        t: its times.
        given, wanted: what `output` predicts, and what is asked for.
    """
    t = t.double()
    alpha, sigma = path.alpha(t), path.sigma(t)
    (a, b), (c, d) = given(path, t), wanted(path, t)
    # (c x_0 + d ε) as a combination of x_t and a x_0 + b ε.
    whole = alpha * b - sigma * a
    of_x, of_output = (c * b - d * a) / whole, (alpha * d - sigma * c) / whole
    return along(of_x, x_t) * x_t + along(of_output, x_t) * output


def along(coefficients: Float[Tensor, "B"], x: Tensor) -> Tensor:
    """Return a coefficient an element of the batch, in x's dtype, shaped to multiply x [B, ...]."""
    return coefficients.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
