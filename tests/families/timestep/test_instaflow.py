"""InstaFlow against its closed forms in one dimension: what reflow straightens and keeps."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from stillhouse.data.pairs import noise_of
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import RECTIFIED_FLOW, along, flow
from stillhouse.diffusion.solvers import ddim, heun, uniform_grid
from stillhouse.diffusion.times import shifted_uniform
from stillhouse.diffusion.trigflow import TrigFlowView
from stillhouse.families.timestep.instaflow import one_step, reflow, squared_error
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.pretraining.denoising import of_flow
from stillhouse.records.diffusion import Condition, PairBatch

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
