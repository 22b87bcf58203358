"""Rollouts: what a student meets on the way, how many steps it takes, and what learns."""

import math
from collections import Counter
from functools import partial

import pytest
import torch
from torch import Generator, Tensor, nn

from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.solvers import few_step
from stillhouse.diffusion.times import shifted_uniform
from stillhouse.errors import UserError
from stillhouse.families.timestep.rollouts import Rollout, backward_simulation, falling

TIMES = [1.5708, 1.3, 1.1, 0.6]
GAUSSIAN = GaussianMixture([[0.6]], [0.4])
SIMULATED = partial(backward_simulation, times=TIMES)
FALLING = partial(falling, times=shifted_uniform, most_steps=4)
LARGE = (20_000, 1)


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def exact(x: Tensor, t: Tensor) -> Tensor:
    """F*, by which a Gaussian's samples are its data in any number of steps."""
    return (along(t.cos(), x) * x - GAUSSIAN.consistency(x, t)) / along(t.sin(), x)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.double)


def visited(
    rollout: Rollout, update: int, seed: int = 1, start: Tensor | None = None
) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return every (x_t, t) that the student is asked at, and x_0."""
    seen: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return exact(x, t)

    x_0 = rollout(network, noise(2, 1) if start is None else start, update, seeded(seed))
    return seen, x_0


def update_of(steps: int, rollout: Rollout = SIMULATED) -> int:
    """Return an update that takes so many steps."""
    return next(u for u in range(100) if len(visited(rollout, u)[0]) == steps)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
def test_it_is_the_sampler_up_to_where_it_stops(steps: int) -> None:
    """Bit for bit `few_step` at the first times of the grid; whole, it is what is generated."""
    met: list[Tensor] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        met.append(x)
        return exact(x, t)

    expected = few_step(network, noise(50, 1), TIMES[:steps], seeded(1))
    seen, x_0 = visited(SIMULATED, update_of(steps), start=noise(50, 1))
    assert torch.equal(x_0, expected)
    assert all(torch.equal(x, y) for (x, _), y in zip(seen, met, strict=True))
    assert [float(t[0]) for _, t in seen] == TIMES[:steps]


def test_a_grid_of_one_time_is_one_step() -> None:
    """At every update; and the first step of a longer grid is that of pure noise at its time."""
    for update in range(5):
        one = partial(backward_simulation, times=[math.pi / 2])
        _, x_0 = visited(one, update)
        t = torch.full((2,), math.pi / 2, dtype=torch.double)
        torch.testing.assert_close(x_0, -exact(noise(2, 1), t))
    _, first = visited(SIMULATED, update_of(1))
    _, alone = visited(partial(backward_simulation, times=TIMES[:1]), 0)
    assert torch.equal(first, alone)


@pytest.mark.parametrize("rollout", [SIMULATED, FALLING])
def test_inputs_are_distributed_as_noised_samples(rollout: Rollout) -> None:
    """Of an exact student, N(μ cos t, s² cos² t + sin² t) at every step, by mean and variance."""
    seen, x_0 = visited(rollout, update_of(4, rollout), start=noise(*LARGE))
    for x_t, t in seen:
        standard = (x_t[:, 0] - 0.6 * t.cos()) / (0.16 * t.cos().square() + t.sin().square()).sqrt()
        assert abs(float(standard.mean())) < 0.03
        assert float(standard.var()) == pytest.approx(1, abs=0.04)
    assert float(x_0.mean()) == pytest.approx(0.6, abs=0.01)


def test_noise_between_steps_is_fresh() -> None:
    """Other than what a rollout begins with, and other than in the step before."""
    inputs: list[Tensor] = []

    # A student that says x_0 = 0: what it is asked at is the noise alone.
    def network(x: Tensor, t: Tensor) -> Tensor:
        inputs.append(x)
        return x * along(t.cos() / t.sin(), x)

    SIMULATED(network, noise(*LARGE), update_of(4), seeded(1))
    together = torch.corrcoef(torch.cat(inputs, 1).T)
    assert (together - torch.eye(4)).abs().max() < 0.04


@pytest.mark.parametrize("rollout", [SIMULATED, FALLING])
def test_the_update_alone_decides_how_many_steps_are_taken(rollout: Rollout) -> None:
    """Ranks draw their own noise, and take as many steps."""
    for update in range(12):
        lengths = {len(visited(rollout, update, seed=rank)[0]) for rank in range(3)}
        assert len(lengths) == 1


def test_each_number_of_steps_is_as_likely() -> None:
    lengths = Counter(len(visited(SIMULATED, update)[0]) for update in range(400))
    assert sorted(lengths) == [1, 2, 3, 4]
    assert all(abs(count - 100) < 4 * math.sqrt(100 * 0.75) for count in lengths.values())


def test_falling_times_take_every_number_of_steps_in_turn() -> None:
    for update in range(9):
        seen, _ = visited(FALLING, update, start=noise(200, 1))
        assert len(seen) == update % 4 + 1
        t = torch.stack([t for _, t in seen])
        assert (t[0] == math.pi / 2).all()
        assert (t.diff(dim=0) <= 0).all()
        assert len(t) == 1 or t[1].unique().numel() > 100, "each sample has its own times"


@pytest.mark.parametrize("rollout", [SIMULATED, FALLING])
@pytest.mark.parametrize("steps", [1, 3])
def test_only_the_last_step_learns(rollout: Rollout, steps: int) -> None:
    """The gradient is that of one step from where the others led."""
    torch.manual_seed(0)
    layer = nn.Linear(1, 1).double()
    grad: list[bool] = []
    last: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, t: Tensor) -> Tensor:
        grad.append(torch.is_grad_enabled())
        last.append((x, t))
        return layer(x)

    x_0 = rollout(network, noise(6, 1), update_of(steps, rollout), seeded(1))
    assert grad == [False] * (steps - 1) + [True]
    x, t = last[-1]
    assert not x.requires_grad
    found = torch.autograd.grad(x_0.sum(), layer.weight)[0]
    torch.testing.assert_close(found, -(along(t.sin(), x) * x).sum().view(1, 1))


def test_times_that_do_not_fall_are_refused() -> None:
    with pytest.raises(UserError, match=r"method\.<phase>\.rollout\.times=\[0\.6, 1\.1\]"):
        visited(partial(backward_simulation, times=[0.6, 1.1]), 0)
