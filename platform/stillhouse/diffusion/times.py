"""Where on TrigFlow's path a step of training takes place.

A time sampler is called with (count, generator) and returns float64 times on the CPU, between 0
and π/2. Papers state some of them in other units: with data of σ_d = 0.5, sCM's and SANA-Sprint's
t = arctan(exp(τ) / σ_d), τ ~ N(P_mean, P_std²), is `log_normal` with mean P_mean - ln σ_d.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.ranges import Count, Finite, Positive, Share

TimeSampler = Callable[[int, torch.Generator], Float[Tensor, "B"]]


def drawn(
    x_0: Float[Tensor, "B ..."], times: TimeSampler, generator: torch.Generator
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B ..."]]:
    """Return a time and noise for each sample."""
    t = times(len(x_0), generator).to(x_0.device)
    noise = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
    return t, noise


def log_normal(
    count: int, generator: torch.Generator, *, mean: Finite = 0.0, std: Positive = 1.6
) -> Float[Tensor, "B"]:
    """Return times whose log tan t, the log ratio of noise to data, is normal.

    Args:
        count: B.
        generator: on the CPU.
        mean, std: of log tan t.
    """
    normal = torch.randn(count, generator=generator, dtype=torch.double)
    return torch.atan(torch.exp(mean + std * normal))


def shifted_uniform(
    count: int,
    generator: torch.Generator,
    *,
    shift: Positive = 1.0,
    least: Share = 0.0,
    most: Share = 1.0,
) -> Float[Tensor, "B"]:
    """Return times whose rectified-flow time s is uniform, then moved towards noise.

    s = shift u / (1 + (shift - 1) u), u uniform; tan t = s / (1 - s).

    Args:
        count: B.
        generator: on the CPU.
        shift: above 1 towards noise.
        least, most: of u.

    Raises:
        UserError: for a range that is none.
    """
    if not least < most:
        raise UserError(f"times.least={least}, times.most={most}: expected least below most")
    u = torch.rand(count, generator=generator, dtype=torch.double)
    u = least + (most - least) * u
    s = shift * u / (1 + (shift - 1) * u)
    return torch.atan2(s, 1 - s)


def scaled_linear_levels(
    count: int,
    generator: torch.Generator,
    *,
    beta_start: Positive = 0.00085,
    beta_end: Positive = 0.012,
    levels: Count = 1000,
    least: Share = 0.0,
    most: Share = 1.0,
) -> Float[Tensor, "B"]:
    """Return times of the levels of noise of Stable Diffusion, all equally likely.

    Args:
        count: B.
        generator: on the CPU.
        beta_start, beta_end: whose roots are the ends of a line, β of a level the square on it.
        levels: T.
        least, most: shares of T, between which a level lies.

    Raises:
        UserError: for a range that is none.
    """
    first, last = math.ceil(least * levels), min(math.floor(most * levels), levels - 1)
    if not first < last:
        raise UserError(f"times.least={least}, times.most={most}: expected least below most")
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, levels, dtype=torch.double).square()
    kept = (1 - betas).cumprod(0)
    return torch.acos(kept[torch.randint(first, last + 1, (count,), generator=generator)].sqrt())


def uniform(count: int, generator: torch.Generator) -> Float[Tensor, "B"]:
    """Return times that are uniform from 0 to π/2."""
    return torch.rand(count, generator=generator, dtype=torch.double) * (math.pi / 2)
