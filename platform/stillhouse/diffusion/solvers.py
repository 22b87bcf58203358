"""From noise to samples along TrigFlow's path: solvers of dx/dt = F, and few-step samplers.

A solver is called with (F, x, times): `x` at times[0], and times that fall to 0. It returns the
sample; `visited` gets each state it comes through. F is called with (x_t [B, ...], t [B]).

    euler      x' = x - d F
    ddim       x' = cos(d) x - sin(d) F         exact where F(x_t, t) = cos t ε - sin t x_0
    heun       x' = x - d (F + F(x - d F, t')) / 2       two calls a step, one in the last

`few_step` samples a consistency function f = cos t x - sin t F: it jumps to x_0 and noises again.
`straightness` says how far a flow is from one that a single step integrates.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.diffusion.trigflow import denoised, noised
from stillhouse.errors import UserError
from stillhouse.ranges import Count, Positive

Velocity = Callable[[Tensor, Float[Tensor, "B"]], Tensor]
# π/2, as it is written with four digits.
LATEST = 1.5708
Visited = Callable[[Tensor, float, Tensor], None]
Solver = Callable[..., Tensor]


def euler(F: Velocity, x: Tensor, times: Sequence[float], visited: Visited | None = None) -> Tensor:
    """Return the sample of as many steps as there are times.

    Args:
        F: the velocity.
        x: [B, ...] at times[0].
        times: falling; the last step goes to 0.
        visited: called with every (x_t, t, F) on the way.
    """
    for t, after in _steps(times):
        slope = _at(F, x, t, visited)
        x = x - (t - after) * slope
    return x


def ddim(F: Velocity, x: Tensor, times: Sequence[float], visited: Visited | None = None) -> Tensor:
    """Return the sample of as many rotations as there are times; arguments as in `euler`."""
    for t, after in _steps(times):
        slope = _at(F, x, t, visited)
        x = math.cos(t - after) * x - math.sin(t - after) * slope
    return x


def heun(F: Velocity, x: Tensor, times: Sequence[float], visited: Visited | None = None) -> Tensor:
    """Return the sample of Heun's second-order method; arguments as in `euler`."""
    for t, after in _steps(times):
        slope = _at(F, x, t, visited)
        step = t - after
        predicted = x - step * slope
        if after > 0:
            slope = (slope + F(predicted, all_at(predicted, after))) / 2
        x = x - step * slope
    return x


def few_step(
    F: Velocity, noise: Tensor, times: Sequence[float], generator: torch.Generator
) -> Tensor:
    """Return samples of a consistency function, a call a time (2410.11081, Sec. 5).

    Args:
        F: of the student.
        noise: [B, ...], at times[0].
        times: falling; [π/2] is one step.
        generator: on the CPU, of the noise that is added between steps.
    """
    check_times(times, key="times")
    x_t = x_0 = noise
    for step, t in enumerate(all_at(noise, time) for time in times):
        if step > 0:
            fresh = torch.randn(noise.shape, generator=generator, dtype=noise.dtype)
            x_t = noised(x_0, fresh.to(noise.device), t)
        x_0 = denoised(x_t, F(x_t, t), t)
    return x_0


def straightness(F: Velocity, noise: Tensor, *, steps: Count = 50) -> float:
    """Return S = E ∫ |(ε - x_0) - v(x_s, s)|² ds along a flow's own paths (2209.03003).

    v is the flow as a rectified one, at x_s = (1 - s) x_0 + s ε, s from 0 to 1: v = F/κ plus what
    the change of scale adds, κ = 1 / (sin t + cos t) (`diffusion.trigflow`). S = 0 where paths are
    lines that are run through evenly: one step then is exact.

    Args:
        F: the velocity.
        noise: [B, ...], where paths begin.
        steps: of Heun's method, even in s; the integral is a sum of trapezoids.
    """
    grid = [math.atan2(1 - i / steps, i / steps) for i in range(steps)]
    states: list[tuple[Tensor, float, Tensor]] = []
    with torch.no_grad():
        x_0 = heun(F, noise, grid, lambda *state: states.append(state))
        states.append((x_0, 0.0, F(x_0, all_at(x_0, 0.0))))
    squares = []
    for x_t, t, slope in states:
        v = (math.sin(t) + math.cos(t)) * slope - (math.cos(t) - math.sin(t)) * x_t
        squares.append((noise - x_0 - v).square().flatten(1).sum(1).mean())
    return float(torch.trapezoid(torch.stack(squares))) / steps


def uniform_grid(steps: Count) -> list[float]:
    """Return π/2, ... in equal steps of the angle; the last step goes to 0."""
    return [math.pi / 2 * (steps - i) / steps for i in range(steps)]


def flow_grid(steps: Count, *, shift: Positive = 1.0) -> list[float]:
    """Return the angles of diffusers' FlowMatchEulerDiscreteScheduler, whose last step goes to 0.

    It shifts both ends of its range, 1 and 1/1000, and then what lies evenly between them.
    """
    smallest = _shifted(1 / 1000, shift)
    evenly = [1 - i * (1 - smallest) / max(1, steps - 1) for i in range(steps)]
    return [math.atan2(s, 1 - s) for s in (_shifted(u, shift) for u in evenly)]


def _shifted(u: float, shift: float) -> float:
    return shift * u / (1 + (shift - 1) * u)


def check_times(times: Sequence[float], *, key: str) -> None:
    """Refuse a list of times that is no way from noise to data.

    Raises:
        UserError: naming the key.
    """
    falling = all(a > b for a, b in itertools.pairwise(times))
    if not times or not falling or not 0 < times[-1] <= times[0] <= LATEST:
        raise UserError(
            f"{key}={list(times)}: expected times that fall strictly from at most π/2 = "
            f"{math.pi / 2:.4f} and stay above 0, such as [1.5708, 1.1]"
        )


def all_at(x: Float[Tensor, "B ..."], t: float) -> Float[Tensor, "B"]:
    """Return the same time for all samples."""
    return torch.full((len(x),), t, dtype=torch.double, device=x.device)


def _steps(times: Sequence[float]) -> list[tuple[float, float]]:
    check_times(times, key="times")
    return list(zip(times, [*times[1:], 0.0], strict=True))


def _at(F: Velocity, x: Tensor, t: float, visited: Visited | None) -> Tensor:
    slope = F(x, all_at(x, t))
    if visited is not None:
        visited(x, t, slope)
    return slope
