"""TBCM: routes, trajectories, what is left out, and its fixed point."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stillhouse.diffusion.guidance import fixed, guided, one_of
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.solvers import flow_grid
from stillhouse.diffusion.tangents import functional
from stillhouse.diffusion.trigflow import noised
from stillhouse.errors import UserError
from stillhouse.evaluation.distances import sliced_wasserstein
from stillhouse.families.timestep.consistency import States, consistency
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.scm import scm
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
    teacher: nn.Module, given: ImageBatch, *, update: int = 0, seed: int = 0, **options
) -> tuple[States, float]:
    """Return what the loss is called with: the states, and r."""
    seen: list[tuple[States, float]] = []

    def loss(networks: Networks, states: States, r: float) -> LossTerms:
        seen.append((states, r))
        return LossTerms(torch.zeros(()))

    networks = Networks(teacher, teacher, None)
    generator = torch.Generator().manual_seed(seed)
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
    """N(μ cos t, s² cos² t + sin² t) for many steps; the variance's error falls as 1/n.

    A Gaussian's rotations are affine: from two noises and their states, of a time's variance.
    """
    noise: list[Tensor] = []

    class Asked(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            noise.append(x)
            return GAUSSIAN(x, t, condition)

    def error(steps: int) -> float:
        errors = []
        for seed in range(8):
            noise.clear()
            states, _ = states_of(Asked(), batch(2), steps=steps, shift=1.0, seed=seed)
            x, t = states.x_t.view(steps - 1, 2), states.t.view(steps - 1, 2)[:, 0]
            deviation = x.diff(dim=1)[:, 0] / noise[0].diff(dim=0).item()
            mean = x[:, 0] - deviation * noise[0][0]
            torch.testing.assert_close(mean, 0.6 * t.cos(), atol=1.2 / steps, rtol=0)
            expected = 0.16 * t.cos().square() + t.sin().square()
            errors.append((deviation.square() - expected).abs().mean())
        return float(torch.stack(errors).mean())

    errors = [error(steps) for steps in (8, 16, 32, 64)]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2, rel=0.25)


def test_guided_paths_do_not_lead_through_noised_data() -> None:
    """At every time unguided states are noised data of their class, and guided ones are not."""
    given, apart = batch(2000, labels=True), []
    for scale in (1.0, 4.0):
        states, _ = states_of(PAIR, given, guidance_scale=partial(fixed, scale=scale))
        torch.testing.assert_close(
            states.velocity,
            guided(PAIR, states.x_t, states.t, states.condition, states.guidance_scale),
        )
        generator = torch.Generator().manual_seed(1)
        normal = torch.randn(len(states.x_t), 2, generator=generator, dtype=torch.double)
        assert states.condition.labels is not None
        x_0 = PAIR.means[states.condition.labels] + 0.3 * normal[:, :1]
        data = noised(x_0, normal[:, 1:], states.t)
        times = zip(states.x_t.split(2000), data.split(2000), strict=True)
        # Of the first class.
        apart.append([sliced_wasserstein(a[::2], b[::2], directions=1) for a, b in times])
    assert max(apart[0]) < 0.12
    assert max(apart[1]) > 0.4
    assert all(near < far for near, far in zip(*(a[5:] for a in apart), strict=True))


@pytest.mark.parametrize("steps", [2, 5, 16, 64])
def test_the_exact_consistency_function_is_a_fixed_point(steps: int) -> None:
    """Of every state: however coarse the path to it, it lies on some path of the teacher."""

    class Exact(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            f = GAUSSIAN.consistency(x, t)
            return (along(t.cos(), x) * x - f) / along(t.sin(), x)

    exact, teacher = (
        tbcm(
            Networks(student, GAUSSIAN, None),
            batch(20),
            Phase(0, 1),
            torch.Generator().manual_seed(0),
            loss=EVEN,
            guidance_scale=fixed,
            steps=steps,
        ).total
        for student in (Exact(), GAUSSIAN)
    )
    assert exact < 1e-20
    assert teacher > 0.01


def test_a_guided_teacher_is_asked_for_two_rows_a_step() -> None:
    rows: list[int] = []

    class Counted(nn.Module):
        def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            rows.append(len(x))
            return PAIR(x, t, condition)

    states, _ = states_of(
        Counted(), batch(6, labels=True), guidance_scale=partial(one_of, scales=[4, 4.5, 5])
    )
    assert rows == [12] * 16
    scales = states.guidance_scale.view(15, 6)
    assert (scales == scales[0]).all(), "one scale a trajectory"
    assert len(set(scales[0].tolist())) > 1


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


@pytest.mark.parametrize(("square", "share"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (2.0, 1.0)])
def test_so_many_trajectories_stay(square: float, share: float) -> None:
    """Of a teacher whose every sample is as far from black: |x_0 - black|² of them, at most all."""
    point = GaussianMixture([[0.7]], [1e-6]).requires_grad_(False)
    black = 0.7 - math.sqrt(square) - 1e-3 * (square >= 1)
    states, _ = states_of(point, batch(2000), steps=3, left_out=partial(near, value=black))
    assert states.kept is not None
    first, second = states.kept.view(2, 2000)
    assert torch.equal(first, second), "a trajectory as a whole"
    assert float(first.mean()) == pytest.approx(share, abs=0.03 if share == 0.5 else 1e-9)


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


def test_with_noised_data_for_its_states_it_is_scm(monkeypatch) -> None:
    """Bit for bit, the loss of `scm` at the same x_t and t: only where states come from differs."""
    torch.manual_seed(0)
    layers, u = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)), nn.Linear(1, 1)

    def student(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        return layers(torch.cat([x, t[:, None].to(x.dtype)], 1))

    networks = Networks(student, PAIR, lambda t: u(t.float()[:, None]).squeeze(1))
    times, scale = [1.5, 1.1, 0.6, 0.2], partial(fixed, scale=4.0)
    all_times = torch.tensor(times, dtype=torch.double).repeat_interleave(10)
    seen: list[States] = []

    def loss(networks: Networks, states: States, r: float) -> LossTerms:
        seen.append(states)
        return EVEN(networks, states, r, weighting=by_noise)

    expected = scm(
        networks,
        ImageBatch(torch.randn(40, 1), Condition(labels=torch.arange(40) % 2)),
        Phase(5, 100),
        torch.Generator().manual_seed(0),
        loss=loss,
        times=lambda count, generator: all_times,
        guidance_scale=scale,
        warmup_steps=10,
    )

    def data(F, noise: Tensor, route: list[float], visited) -> Tensor:
        visited(noise, math.pi / 2, F(noise, torch.full((10,), math.pi / 2).double()))
        (states,) = seen
        places = zip(states.x_t.split(10), times, states.velocity.split(10), strict=True)
        for x_t, t, velocity in places:
            torch.testing.assert_close(F(x_t, torch.full((10,), t).double()), velocity)
            visited(x_t, t, velocity)
        return noise

    monkeypatch.setattr("stillhouse.families.timestep.tbcm.ddim", data)
    found = tbcm(
        networks,
        batch(10, torch.float, labels=True),
        Phase(5, 100),
        torch.Generator().manual_seed(0),
        loss=loss,
        guidance_scale=scale,
        steps=5,
        warmup_steps=10,
    )
    assert torch.equal(found.total, expected.total)


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
