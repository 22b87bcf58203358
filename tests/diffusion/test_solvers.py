"""Solvers, few-step samplers, time samplers and guidance, against closed forms."""

import math
from functools import partial

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from stillhouse.diffusion import solvers
from stillhouse.diffusion.guidance import fixed, guided, one_of
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import RECTIFIED_FLOW, along, flow
from stillhouse.diffusion.times import (
    log_normal,
    scaled_linear_levels,
    shifted_uniform,
    uniform,
)
from stillhouse.diffusion.trigflow import TrigFlowView
from stillhouse.errors import UserError
from stillhouse.records.diffusion import Condition

GAUSSIAN = GaussianMixture([[0.6, -0.4]], [0.4])


def noise(count: int = 4000, dims: int = 2) -> Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(0), dtype=torch.double)


def velocity(x: Tensor, t: Tensor) -> Tensor:
    return GAUSSIAN(x, t, Condition())


def test_ddim_is_exact_for_a_fixed_pair_of_ends() -> None:
    x_0, end = noise(3), noise(3).flip(0)

    def flow(x: Tensor, t: Tensor) -> Tensor:
        return along(t.cos(), x) * end - along(t.sin(), x) * x_0

    states = []
    out = solvers.ddim(flow, end, [math.pi / 2, 1.2, 0.4], lambda x, t, F: states.append((x, t)))
    torch.testing.assert_close(out, x_0)
    for x, t in states:
        torch.testing.assert_close(x, math.cos(t) * x_0 + math.sin(t) * end)


@pytest.mark.parametrize(
    ("solver", "order"), [(solvers.euler, 1), (solvers.ddim, 1), (solvers.heun, 2)]
)
def test_the_order_of_a_solver(solver: solvers.Solver, order: int) -> None:
    """Errors against the exact end of the path, f* = μ + s ε, fall by 2^order a doubling."""
    x = noise(200)
    truth = GAUSSIAN.consistency(x, torch.full((200,), math.pi / 2))
    torch.testing.assert_close(truth, GAUSSIAN.means + 0.4 * x)
    coarse, fine = (
        float((solver(velocity, x, solvers.uniform_grid(n)) - truth).norm()) for n in (40, 80)
    )
    assert coarse / fine == pytest.approx(2**order, rel=0.25)


def test_one_step_of_a_flow_collapses_to_the_mean() -> None:
    """InstaFlow's card: an Euler step of the curved flow has no variance at all."""
    out = solvers.ddim(velocity, noise(), [math.pi / 2])
    torch.testing.assert_close(out, GAUSSIAN.means.expand_as(out))


def test_few_steps_of_the_exact_consistency_function_are_the_data() -> None:
    def flow(x: Tensor, t: Tensor) -> Tensor:
        f = GAUSSIAN.consistency(x, t)
        return (along(t.cos(), x) * x - f) / along(t.sin(), x)

    generator = torch.Generator().manual_seed(1)
    for times in ([math.pi / 2], [math.pi / 2, 1.1], [math.pi / 2, 1.3, 1.1, 0.6]):
        out = solvers.few_step(flow, noise(20_000), times, generator)
        assert (out.mean(0) - GAUSSIAN.means[0]).abs().max() < 0.02
        assert (out.std(0) - 0.4).abs().max() < 0.02


def test_a_few_step_sampler_noises_again() -> None:
    """x_0 of the first step, noised to the second time, is what the second call gets."""
    asked: list[tuple[Tensor, Tensor]] = []

    def flow(x: Tensor, t: Tensor) -> Tensor:
        asked.append((x, t))
        return -x

    start = noise(5)
    solvers.few_step(flow, start, [math.pi / 2, 0.3], torch.Generator().manual_seed(3))
    fresh = torch.randn(start.shape, generator=torch.Generator().manual_seed(3), dtype=torch.double)
    torch.testing.assert_close(asked[1][0], math.cos(0.3) * start + math.sin(0.3) * fresh)
    assert (asked[1][1] == 0.3).all()


def test_grids() -> None:
    assert solvers.uniform_grid(2) == [math.pi / 2, math.pi / 4]
    # Of SANA, as TBCM's card lists them.
    assert solvers.flow_grid(16, shift=2.5) == pytest.approx(
        [
            *(1.5708, 1.5423, 1.5095, 1.4714, 1.4268, 1.3741, 1.3112, 1.2356),
            *(1.1440, 1.0331, 0.8997, 0.7425, 0.5642, 0.3734, 0.1832, 0.0063),
        ],
        abs=1e-4,
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_flow_grid_is_that_of_diffusers(shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(8)
    s = scheduler.sigmas[:-1].double()
    angles = torch.atan2(s, 1 - s).tolist()
    assert solvers.flow_grid(8, shift=shift) == pytest.approx(angles, abs=1e-6)


class Flow(nn.Module):
    """Some velocity of a rectified flow."""

    def forward(self, x: Tensor, s: Tensor, *_) -> Tensor:
        return torch.tanh(2 * x.flip(1) + along(3 * s, x)) - along(s, x) * x


def test_rotations_of_a_wrapped_flow_are_its_own_steps() -> None:
    """SANA-Sprint's wrapper loses nothing: `ddim` of the view is Euler of the flow, as diffusers
    steps, at the same times; at others both go to the same sample as 1/n."""
    view, start = TrigFlowView(Flow(), RECTIFIED_FLOW, flow), noise(50).float()

    def wrapped(x: Tensor, t: Tensor) -> Tensor:
        return view(x, t, Condition())

    gaps = []
    for steps in (3, 20, 40):
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        scheduler.set_timesteps(steps)
        x = start
        for time, s in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
            x = scheduler.step(Flow()(x, s.expand(50)), time, x, return_dict=False)[0]
        rotated = solvers.ddim(wrapped, start, solvers.flow_grid(steps, shift=3.0))
        torch.testing.assert_close(rotated, x, atol=1e-5, rtol=0)
        elsewhere = solvers.ddim(wrapped, start, solvers.uniform_grid(steps))
        gaps.append(float((elsewhere - x).norm()))
    assert gaps[0] > 0.1
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.25)


@pytest.mark.parametrize("times", [[], [1.0, 1.0], [0.5, 1.0], [2.0, 1.0], [1.0, 0.0]])
def test_times_that_do_not_fall_are_refused(times: list[float]) -> None:
    with pytest.raises(UserError) as refusal:
        solvers.check_times(times, key="evaluation.times")
    assert str(refusal.value) == (
        f"evaluation.times={times}: expected times that fall strictly from at most π/2 = 1.5708 "
        "and stay above 0, such as [1.5708, 1.1]"
    )


def test_time_samplers() -> None:
    generator = torch.Generator().manual_seed(0)
    t = log_normal(20_000, generator, mean=-0.4, std=1.6)
    ratio = t.tan().log()
    assert ratio.mean() == pytest.approx(-0.4, abs=0.05)
    assert ratio.std() == pytest.approx(1.6, abs=0.05)
    for sampler in (uniform, partial(shifted_uniform, shift=5.0), partial(log_normal, std=9.0)):
        t = sampler(20_000, generator)
        assert t.dtype == torch.double
        assert (t > 0).all()
        assert (t < math.pi / 2 + 1e-12).all()
    t = shifted_uniform(20_000, generator, shift=5.0)
    s = t.sin() / (t.sin() + t.cos())
    assert (s / (5 - 4 * s)).mean() == pytest.approx(0.5, abs=0.02)


def test_guidance() -> None:
    """w = 1 is the conditional network, 0 the other, and beyond it goes on along the difference."""
    mixture = GaussianMixture([[1.0], [-1.0]], [0.3, 0.5])
    x, t = noise(6, 1), torch.linspace(0.2, 1.5, 6, dtype=torch.double)
    condition = Condition(labels=torch.tensor([0, 1, 0, 1, 0, 1]))
    said, none = mixture(x, t, condition), mixture(x, t, Condition())
    generator = torch.Generator()
    for w, expected in ((1.0, said), (0.0, none), (4.0, 4 * said - 3 * none)):
        F = guided(mixture, x, t, condition, fixed(6, generator, scale=w))
        torch.testing.assert_close(F, expected)
    mixed = torch.tensor([1.0, 0, 4, 1, 0, 4], dtype=torch.double)
    F = guided(mixture, x, t, condition, mixed)
    torch.testing.assert_close(F, none + mixed[:, None] * (said - none))


def test_scales_are_drawn_evenly() -> None:
    drawn = one_of(3000, torch.Generator().manual_seed(0), scales=[4, 4.5, 5])
    assert {4.0, 4.5, 5.0} == set(drawn.tolist())
    assert all(abs(float((drawn == w).double().mean()) - 1 / 3) < 0.03 for w in (4, 4.5, 5))
    with pytest.raises(UserError, match="expected at least one number"):
        one_of(3, torch.Generator(), scales=[])


def test_a_teacher_without_an_unconditional_branch_cannot_be_guided() -> None:
    mixture = GaussianMixture([[1.0], [-1.0]], [0.3, 0.5])
    mixture.unconditional = False
    x, t = noise(2, 1), torch.tensor([0.3, 0.9], dtype=torch.double)
    condition = Condition(labels=torch.tensor([0, 1]))
    generator = torch.Generator()
    plain = guided(mixture, x, t, condition, fixed(2, generator, scale=1.0))
    torch.testing.assert_close(plain, mixture(x, t, condition))
    with pytest.raises(UserError) as refusal:
        guided(mixture, x, t, condition, fixed(2, generator, scale=4.5))
    assert str(refusal.value) == (
        "guidance_scale=4.5: the network knows no samples without a condition, so it cannot be "
        "guided; expected 1, or teacher and fake score that were trained with "
        "method.condition_dropout above 0 and student.unconditional=true"
    )


def test_levels_are_those_of_stable_diffusion() -> None:
    """By diffusers' own ᾱ, all equally likely, between the shares that are asked for."""
    kept = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).alphas_cumprod
    angles = torch.acos(kept.double().sqrt())
    t = scaled_linear_levels(20_000, torch.Generator().manual_seed(0), least=0.02, most=0.98)
    level = (t[:, None] - angles).abs().argmin(1)
    torch.testing.assert_close(t, angles[level], rtol=0, atol=1e-6)
    assert (level.min(), level.max()) == (20, 980)
    assert level.double().mean() == pytest.approx(500, abs=8)
    with pytest.raises(UserError, match="expected least below most"):
        scaled_linear_levels(1, torch.Generator(), least=0.5, most=0.2)
