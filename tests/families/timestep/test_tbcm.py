"""TBCM: routes, trajectories, what is left out, and its fixed point."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stillhouse.diffusion.guidance import fixed, guided
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.solvers import flow_grid
from stillhouse.diffusion.tangents import functional
from stillhouse.errors import UserError
from stillhouse.families.timestep.consistency import States, consistency
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.tbcm import calmed, near, route, tbcm
from stillhouse.objectives.consistency import by_noise, even, scm_tangent
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.records.losses import LossTerms

GAUSSIAN = GaussianMixture([[0.6]], [0.4]).requires_grad_(False)
PAIR = GaussianMixture([[1.0], [-1.0]], [0.3, 0.3]).requires_grad_(False)
EVEN = partial(consistency, tangent=functional, form=scm_tangent, weighting=even)


def batch(count: int, dtype: torch.dtype = torch.double, labels: bool = False) -> ImageBatch:
    # What the pictures hold is not read: NaN would be seen at once.
    x_0 = torch.full((count, 1), torch.nan, dtype=dtype)
    said = torch.arange(count) % 2 if labels else None
    return ImageBatch(x_0, Condition(labels=said))


def states_of(
    teacher: nn.Module, given: ImageBatch, *, update: int = 0, **options
) -> tuple[States, float]:
    """Return what the loss is called with: the states, and r."""
    seen: list[tuple[States, float]] = []

    def loss(networks: Networks, states: States, r: float) -> LossTerms:
        seen.append((states, r))
        return LossTerms(torch.zeros(()))

    networks = Networks(teacher, teacher, None)
    generator = torch.Generator().manual_seed(0)
    options = {"guidance_scale": fixed} | options
    tbcm(networks, given, Phase(update, 100), generator, loss=loss, **options)
    return seen[0]


def test_a_route_has_one_time_in_every_gap() -> None:
    grid = flow_grid(16, shift=2.5)
    routes = [route(grid, torch.Generator().manual_seed(seed)) for seed in range(2000)]
    for times in routes[:50]:
        assert times[0] == math.pi / 2
        assert all(a > b for a, b in itertools.pairwise(times))
        assert all(grid[i] <= times[i] <= grid[i - 1] for i in range(1, 16))
    means = torch.tensor(routes).mean(0)[1:]
    middles = (torch.tensor(grid[1:]) + torch.tensor(grid[:-1])) / 2
    torch.testing.assert_close(means, middles, atol=0.01, rtol=0)


def test_states_are_the_teachers_path_with_its_velocity() -> None:
    """15 states a trajectory, each one the rotation of the one before; pure noise is none."""
    calls = 0

    class Counted(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            nonlocal calls
            calls += 1
            return GAUSSIAN(x, t, condition)

    states, _ = states_of(Counted(), batch(7))
    assert calls == 16
    x = states.x_t.view(15, 7, 1)
    t, F = states.t.view(15, 7), states.velocity.view(15, 7, 1)
    assert (t.diff(dim=0) < 0).all()
    assert (t < math.pi / 2).all()
    d = t[:-1] - t[1:]
    torch.testing.assert_close(x[1:], d.cos()[..., None] * x[:-1] - d.sin()[..., None] * F[:-1])
    torch.testing.assert_close(states.velocity, GAUSSIAN(states.x_t, states.t, Condition()))


def test_states_are_distributed_as_the_flow_is() -> None:
    """N(μ cos t, s² cos² t + sin² t) for many steps; the variance's error falls as 1/n."""

    def error(steps: int) -> float:
        states, _ = states_of(GAUSSIAN, batch(4000), steps=steps, shift=1.0)
        x, t = states.x_t.view(steps - 1, -1), states.t.view(steps - 1, -1)[:, 0]
        expected = 0.16 * t.cos().square() + t.sin().square()
        assert (x.mean(1) - 0.6 * t.cos()).abs().max() < 0.08
        return float((x.var(1) - expected).abs().mean())

    coarse, fine = error(6), error(48)
    assert coarse / fine > 3


def test_guided_paths_do_not_lead_through_noised_data() -> None:
    plain, _ = states_of(PAIR, batch(2000, labels=True))
    strong, _ = states_of(PAIR, batch(2000, labels=True), guidance_scale=partial(fixed, scale=4.0))
    late = slice(-2000, None)
    assert plain.x_t[late].abs().std() == pytest.approx(0.3, abs=0.1)
    assert strong.x_t[late].abs().std() < 0.7 * plain.x_t[late].abs().std()
    torch.testing.assert_close(
        strong.velocity, guided(PAIR, strong.x_t, strong.t, strong.condition, strong.guidance_scale)
    )


def test_the_exact_consistency_function_is_a_fixed_point() -> None:
    class Exact(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            f = GAUSSIAN.consistency(x, t)
            return (along(t.cos(), x) * x - f) / along(t.sin(), x)

    terms = tbcm(
        Networks(Exact(), GAUSSIAN, None),
        batch(20),
        Phase(0, 1),
        torch.Generator().manual_seed(0),
        loss=EVEN,
        guidance_scale=fixed,
    )
    assert terms.total < 1e-20
    teacher = tbcm(
        Networks(GAUSSIAN, GAUSSIAN, None),
        batch(20),
        Phase(0, 1),
        torch.Generator().manual_seed(0),
        loss=EVEN,
        guidance_scale=fixed,
    )
    assert teacher.total > 0.1


def test_what_is_left_out_counts_for_nothing() -> None:
    """All but the second trajectory: value and gradient are those of the second alone."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    class Student(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            return layers(torch.cat([x, t[:, None]], 1))

    def second(end: Tensor) -> Tensor:
        return (torch.arange(len(end)) != 1).double()

    seen: list[States] = []

    def kept(networks: Networks, states: States, r: float) -> LossTerms:
        seen.append(states)
        return EVEN(networks, states, r, weighting=by_noise)

    networks = Networks(Student(), GAUSSIAN, None)
    terms = tbcm(
        networks,
        batch(3),
        Phase(0, 1),
        torch.Generator().manual_seed(0),
        loss=kept,
        guidance_scale=fixed,
        left_out=second,
    )
    rows = torch.arange(45).view(15, 3)[:, 1]
    (states,) = seen
    alone = States(
        states.x_t[rows],
        states.t[rows],
        states.velocity[rows],
        Condition(),
        torch.ones(15).double(),
    )
    expected = EVEN(networks, alone, 1.0, weighting=by_noise)
    torch.testing.assert_close(terms.total, expected.total)
    parameters = list(layers.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(terms.total, parameters),
        torch.autograd.grad(expected.total, parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_the_black_filter() -> None:
    x_0 = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [5.0, 5.0]]) - 2.0
    assert near(x_0, value=-2.0).tolist() == [1.0, 0.5, 0.0, 0.0]


def test_schedules() -> None:
    def r(update: int) -> float:
        return states_of(
            GAUSSIAN, batch(2), update=update, warmup_steps=4000, calm_down_from=15_000
        )[1]

    assert [r(u) for u in (0, 2000, 4000, 15_000, 16_000, 17_000, 40_000)] == pytest.approx(
        [0, 0.5, 1, 1, 0.875, 0.75, 0.75]
    )
    assert calmed(5, 10, 2, 0.5) == 1


def test_fewer_trajectories_than_the_batch_has() -> None:
    states, _ = states_of(PAIR, batch(8, labels=True), trajectories=2, steps=4)
    assert len(states.x_t) == 6
    assert states.condition.labels is not None
    assert states.condition.labels.tolist() == [0, 1, 0, 1, 0, 1]


def test_given_the_same_states_it_is_scm() -> None:
    """The loss is the same function: only where the states come from differs."""
    states, r = states_of(GAUSSIAN, batch(5, torch.float))
    torch.manual_seed(0)
    student = nn.Linear(1, 1)
    networks = Networks(lambda x, t, condition, scale=None: student(x), GAUSSIAN, None)
    kept = States(**{**vars(states), "kept": None})
    torch.testing.assert_close(EVEN(networks, states, r).total, EVEN(networks, kept, r).total)


def test_it_needs_a_teacher() -> None:
    with pytest.raises(UserError, match="teacher=null: TBCM follows a teacher; expected teacher="):
        tbcm(
            Networks(GAUSSIAN, None, None),
            batch(2),
            Phase(0, 1),
            torch.Generator(),
            loss=EVEN,
            guidance_scale=fixed,
        )
