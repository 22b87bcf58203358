"""InstaFlow against its closed forms in one dimension: what reflow straightens and keeps."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from stillhouse.data.pairs import noise_of
from stillhouse.diffusion.guidance import guided
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import RECTIFIED_FLOW, along, flow
from stillhouse.diffusion.solvers import Solver, ddim, heun, straightness, uniform_grid
from stillhouse.diffusion.times import shifted_uniform, uniform
from stillhouse.diffusion.trigflow import TrigFlowView, noised
from stillhouse.errors import UserError
from stillhouse.evaluation.distances import sliced_wasserstein
from stillhouse.families.timestep.instaflow import one_step, reflow, squared_error
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.pretraining.denoising import of_flow
from stillhouse.records.diffusion import UNCONDITIONAL, Condition, PairBatch

MU, S = 1.5, 0.4
TEACHER = GaussianMixture([[MU]], [S]).requires_grad_(False)


class Straight(nn.Module):
    """v_2(x, s) of the pairs (ε, μ + s ε): (1 - S) ε(x, s) - μ, with x = (1 - s)(μ + S ε) + s ε."""

    def forward(self, x: Tensor, s: Tensor, condition: Condition, scale=None) -> Tensor:
        share = along(s, x)
        noise = (x - (1 - share) * MU) / ((1 - share) * S + share)
        return (1 - S) * noise - MU


STRAIGHT = TrigFlowView(Straight(), RECTIFIED_FLOW, flow)


def pairs(count: int = 4000) -> PairBatch:
    noise = noise_of(0, range(count), (1,)).double()
    return PairBatch(noise, MU + S * noise, Condition())


def quantiles(count: int = 2000) -> Tensor:
    """Return noise without randomness, of variance 1 exactly."""
    places = (torch.arange(count, dtype=torch.double) + 0.5) / count
    noise = torch.special.ndtri(places)[:, None]
    return noise / noise.square().mean().sqrt()


def evenly(steps: int) -> list[float]:
    """Return times that are even in the flow's s: Euler's method of the flow is `ddim` at them."""
    return [math.atan2(1 - i / steps, i / steps) for i in range(steps)]


def reflow_loss(student, batch: PairBatch) -> float:
    terms = reflow(
        Networks(student, None, None),
        batch,
        Phase(0, 1),
        torch.Generator().manual_seed(1),
        times=shifted_uniform,
        weighting=of_flow,
    )
    return float(terms.total)


def distil_loss(student, batch: PairBatch) -> float:
    terms = one_step(
        Networks(student, None, None),
        batch,
        Phase(0, 1),
        torch.Generator(),
        similarity=squared_error,
    )
    return float(terms.total)


def velocity(student, x: Tensor, t: Tensor) -> Tensor:
    return student(x, t, Condition())


def test_the_straight_flow_has_no_loss_and_the_curved_one_has() -> None:
    """0 for the pairs' own flow; for v_1, whose pairs these are too, what it turns on its way."""
    assert reflow_loss(STRAIGHT, pairs()) < 1e-20
    assert reflow_loss(TEACHER, pairs()) > 0.02


def test_the_curved_flow_is_that_of_the_independent_coupling() -> None:
    """The paper's v_1 = μ + (x - τ μ) (τ s² - (1 - τ)) / V at its time τ = 1 - s, turned round."""
    x_t, t = pairs(50).noise, torch.linspace(0, math.pi / 2, 50, dtype=torch.double)
    scale = along(1 / (t.sin() + t.cos()), x_t)
    tau, x = scale * along(t.cos(), x_t), scale * x_t
    V = tau**2 * S**2 + (1 - tau) ** 2
    v_1 = MU + (x - tau * MU) * (tau * S**2 - (1 - tau)) / V
    F = scale * -v_1 + along(t.cos() - t.sin(), x_t) * x
    torch.testing.assert_close(TEACHER(x_t, t, Condition()), F)


def test_reflow_straightens_and_a_second_one_changes_nothing() -> None:
    """S(v_1) = ∫ (S - 1 - dm/dτ)² dτ with the path's deviation m = √V; S(v_2) = 0."""
    tau = torch.linspace(0, 1, 20_001, dtype=torch.double)
    m = (tau**2 * S**2 + (1 - tau) ** 2).sqrt()
    turned = (S - 1 - (tau * S**2 - (1 - tau)) / m).square()
    expected = float(torch.trapezoid(turned, tau))
    assert abs(expected - 0.172) < 5e-4
    found = straightness(partial(velocity, TEACHER), quantiles())
    assert abs(found - expected) < 0.01 * expected
    assert straightness(partial(velocity, STRAIGHT), quantiles()) < 1e-6
    batch = pairs()
    again = ddim(partial(velocity, STRAIGHT), batch.noise, evenly(3))
    torch.testing.assert_close(again, batch.x_0)
    assert reflow_loss(STRAIGHT, PairBatch(batch.noise, again, Condition())) < 1e-20


def test_straightness_is_a_sum_over_coordinates() -> None:
    """Of two coordinates that are alike it is twice that of one."""
    both = GaussianMixture([[MU, MU]], [S])
    one, two = (
        straightness(partial(velocity, flow), quantiles(100).expand(-1, d).clone(), steps=20)
        for flow, d in ((TEACHER, 1), (both, 2))
    )
    assert abs(two - 2 * one) < 1e-9


def test_a_flow_keeps_the_law_of_its_interpolation() -> None:
    """Of the curved flow at every time, by the mixture's distribution function; of v_2 by path."""
    mixture = GaussianMixture([[1.2], [-0.8]], [0.3, 0.5], [2.0, 1.0])
    noise, states = quantiles(), []
    heun(partial(velocity, mixture), noise, uniform_grid(60), lambda *state: states.append(state))
    places = torch.special.ndtr(noise)
    for x, t, _ in states[10::10]:
        deviations = (mixture.deviations.square() * math.cos(t) ** 2 + math.sin(t) ** 2).sqrt()
        below = torch.special.ndtr((x - mixture.means.T * math.cos(t)) / deviations)
        assert ((below * mixture.weights).sum(1, keepdim=True) - places).abs().max() < 2e-3
    batch, states = pairs(), []
    ddim(partial(velocity, STRAIGHT), batch.noise, evenly(8), lambda *state: states.append(state))
    for x, t, _ in states:
        times = torch.full((len(x),), t, dtype=torch.double)
        torch.testing.assert_close(x, noised(batch.x_0, batch.noise, times))


def test_a_flow_costs_no_more_than_the_coupling_that_it_is_of() -> None:
    """E |ε - x_0|²: in one dimension (1 - S)² + μ² of the pairs, and no reflow lowers it."""
    ring = GaussianMixture([[1.4, 0.0], [0.0, 1.4], [-1.4, 0.0], [0.0, -1.4]], [0.1] * 4)
    for mixture, dims in ((TEACHER, 1), (ring, 2)):
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1000, dims, generator=generator, dtype=torch.double)
        x_0 = heun(partial(velocity, mixture), noise, uniform_grid(40))
        apart, paired = (float((noise - to).square().sum(1).mean()) for to in (x_0.roll(1, 0), x_0))
        assert paired < 0.85 * apart
    noise = quantiles()
    for student in (TEACHER, STRAIGHT):
        x_0 = heun(partial(velocity, student), noise, uniform_grid(60))
        cost = float((noise - x_0).square().mean())
        assert abs(cost - MU**2 - (1 - S) ** 2) < 0.01


def test_the_loss_is_the_squared_error_of_the_velocity() -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor, s: Tensor, condition: Condition, scale=None) -> Tensor:
            return torch.zeros_like(x)

    batch = pairs()
    expected = float((batch.noise - batch.x_0).square().mean())
    loss = reflow_loss(TrigFlowView(Zero(), RECTIFIED_FLOW, flow), batch)
    torch.testing.assert_close(loss, expected)


def test_pairs_must_stay_pairs() -> None:
    """Shuffled, the best flow has the loss of an independent coupling, E Var(ε - x_0 | x_s)."""
    batch = pairs()
    shuffled = PairBatch(batch.noise, batch.x_0.roll(1, 0), Condition())
    s = torch.linspace(0.0005, 0.9995, 1000, dtype=torch.double)
    variance = S**2 * (1 - s) ** 2 + s**2
    expected = float((S**2 / variance).mean())
    assert abs(reflow_loss(TEACHER, shuffled) - expected) < 0.05 * expected
    assert reflow_loss(STRAIGHT, shuffled) > 1.2 * expected


def test_one_step_of_the_straight_flow_is_the_teachers_sample() -> None:
    batch = pairs()
    truth = TEACHER.consistency(batch.noise, torch.full((4000,), math.pi / 2))
    torch.testing.assert_close(batch.x_0, truth)
    for steps in (1, 2, 4):
        out = ddim(partial(velocity, STRAIGHT), batch.noise, uniform_grid(steps))
        torch.testing.assert_close(out, truth)
    collapsed = ddim(partial(velocity, TEACHER), batch.noise, [math.pi / 2])
    assert float(collapsed.std()) < 1e-9
    integrated = heun(partial(velocity, TEACHER), batch.noise, uniform_grid(60))
    torch.testing.assert_close(integrated, truth, atol=5e-3, rtol=0)


def test_more_steps_change_the_curved_flow_only() -> None:
    """From N to 2N Euler steps; v_1's one step is μ, its two are μ + 0.138 ε."""
    noise, changes = quantiles(), {}
    for name, student in (("straight", STRAIGHT), ("curved", TEACHER)):
        ends = [ddim(partial(velocity, student), noise, evenly(n)) for n in (1, 2, 4, 8, 16)]
        changes[name] = [float((a - b).square().mean().sqrt()) for a, b in pairwise(ends)]
    assert max(changes["straight"]) < 1e-12
    half = (1 + (S**2 / 2 - 1 / 2) / (S**2 / 4 + 1 / 4) / 2) / 2
    assert abs(changes["curved"][0] - abs(half)) < 1e-9
    assert min(changes["curved"]) > 0.02


def test_one_step_is_distilled_at_pure_noise() -> None:
    """L_distil of v_2 is 0; of the curved v_1, whose one step is the mean, the data's variance."""
    batch = pairs()
    assert distil_loss(STRAIGHT, batch) < 1e-20
    expected = float((batch.x_0 - MU).square().mean())
    torch.testing.assert_close(distil_loss(TEACHER, batch), expected)
    asked: list[Tensor] = []

    def student(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        asked.append(t)
        return torch.zeros_like(x)

    distil_loss(student, batch)
    assert (asked[0] == math.pi / 2).all()


def test_noise_is_addressed_by_its_place() -> None:
    together = noise_of(7, [3, 9], (2, 4))
    assert torch.equal(together[1], noise_of(7, [9], (2, 4))[0])
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together[0], noise_of(8, [3], (2, 4))[0])


class Reflowed(nn.Module):
    """The best v of pairs in one dimension whose samples grow with their noise, with and without
    the class of a sample; all of a batch at one time.

    Args:
        noise: [N], growing.
        x_0: [C, N], what each class makes of it.
    """

    def __init__(self, noise: Tensor, x_0: Tensor) -> None:
        super().__init__()
        self.noise, self.x_0 = noise, x_0

    def forward(self, x: Tensor, s: Tensor, condition: Condition, scale=None) -> Tensor:
        velocities, densities = [], []
        for x_0 in self.x_0:
            # A class has one path through x, between two of the lines.
            lines = (1 - s[0]) * x_0 + s[0] * self.noise
            after = torch.searchsorted(lines, x[:, 0].contiguous()).clamp(1, len(lines) - 1)
            gap = lines[after] - lines[after - 1]
            share = (x[:, 0] - lines[after - 1]) / gap
            noise = self.noise[after - 1].lerp(self.noise[after], share)
            velocities.append(noise - x_0[after - 1].lerp(x_0[after], share))
            slope = (self.noise[after] - self.noise[after - 1]) / gap
            densities.append(slope.log() - noise.square() / 2)
        velocity, density = torch.stack(velocities, 1), torch.stack(densities, 1)
        assert condition.labels is not None
        labels = condition.labels[:, None]
        other = (labels >= 0) & (labels != torch.arange(len(self.x_0)))
        weights = density.masked_fill(other, -torch.inf).softmax(1)
        return (weights * velocity).sum(1, keepdim=True)


def test_guidance_is_in_the_pairs() -> None:
    """Pairs of a teacher guided with 4: unguided, their flow draws its samples, in one step, too;
    guided once more it leaves them, the further the stronger."""
    teacher = GaussianMixture([[1.0], [-1.0]], [0.3, 0.5])

    def drawn(solver: Solver, network, noise: Tensor, scale: float, steps: int) -> Tensor:
        labels = torch.arange(2).repeat_interleave(len(noise))
        scales = torch.full((len(labels),), scale, dtype=torch.double)

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return guided(network, x, t, Condition(labels), scales)

        return solver(velocity, noise.repeat(2, 1), evenly(steps)).view(2, -1)

    knots = torch.linspace(-5, 5, 401, dtype=torch.double)
    recorded = drawn(heun, teacher, knots[:, None], 4.0, 40)
    student = TrigFlowView(Reflowed(knots, recorded), RECTIFIED_FLOW, flow)
    noise = pairs(300).noise
    truth = drawn(heun, teacher, noise, 4.0, 40)
    for steps in (1, 4):
        found = drawn(ddim, student, noise, 1.0, steps)
        torch.testing.assert_close(found, truth, atol=1e-3, rtol=0)
    apart = [
        max(sliced_wasserstein(a[:, None], b[:, None]) for a, b in zip(found, truth, strict=True))
        for found in (drawn(ddim, student, noise, scale, 16) for scale in (1.0, 1.5, 2.0, 3.0))
    ]
    assert all(near < far for near, far in pairwise(apart))
    unguided = drawn(heun, teacher, noise, 1.0, 40)
    assert (unguided - truth).abs().mean() > 0.1


def test_a_straight_flow_learns_what_it_says_without_a_condition() -> None:
    """So many pairs lose their condition, and no more."""
    said: list[Tensor] = []

    def student(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        assert condition.labels is not None
        said.append(condition.labels)
        return torch.zeros_like(x)

    noise = torch.zeros(4000, 2)
    batch = PairBatch(noise, noise, Condition(labels=torch.ones(4000, dtype=torch.long)))
    for share in (0.0, 0.25):
        generator = torch.Generator().manual_seed(0)
        networks = Networks(student, None, None)
        method = partial(reflow, times=uniform, weighting=of_flow, condition_dropout=share)
        method(networks, batch, Phase(0, 1), generator)
    kept, dropped = (labels == UNCONDITIONAL for labels in said)
    assert not kept.any()
    assert float(dropped.double().mean()) == pytest.approx(0.25, abs=0.03)
    knows_none = TrigFlowView(Straight(), RECTIFIED_FLOW, flow)
    knows_none.unconditional = False
    with pytest.raises(UserError, match=r"^method\.condition_dropout=0\.25: the network knows no"):
        method(Networks(knows_none, None, None), batch, Phase(0, 1), generator)
