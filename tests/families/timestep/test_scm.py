"""sCM against the exact consistency function of a Gaussian, and what it asks the networks."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stillhouse.diffusion.guidance import fixed, guided
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.tangents import central_difference, functional, one_pass
from stillhouse.diffusion.times import log_normal
from stillhouse.diffusion.trigflow import denoised, noised
from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.families.timestep.consistency import States, consistency, warmed
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.scm import scm
from stillhouse.objectives.consistency import by_noise, even, scm_tangent
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.records.losses import LossTerms
from stillhouse.students.denoisers import Denoiser
from stillhouse.students.modeling_few_step import SmallDiT

# N(0.3, 0.2²) of the card, whose unit is σ_d = 0.5.
UNIT = 0.5
TEACHER = GaussianMixture([[0.3 / UNIT]], [0.2 / UNIT]).requires_grad_(False)
EVEN = partial(consistency, tangent=functional, form=scm_tangent, weighting=even)


class Small(nn.Module):
    """An MLP of x and of two frequencies of t."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers = [nn.Linear(5, width), nn.SiLU()]
        for _ in range(2):
            layers += [nn.Linear(width, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        angles = torch.stack([t / 2, t], 1).to(x.dtype)
        return self.layers(torch.cat([x, angles.sin(), angles.cos()], 1))


def error_of(student: nn.Module) -> float:
    """Return the RMSE to f*, in the card's unit."""
    generator = torch.Generator().manual_seed(9)
    x_0, _ = TEACHER.sample(4096, generator)
    t = log_normal(4096, generator, mean=0.0)
    x_t = noised(x_0, torch.randn(x_0.shape, generator=generator), t)
    with torch.no_grad():
        f = denoised(x_t, student(x_t, t, Condition()), t)
    return UNIT * float((f - TEACHER.consistency(x_t, t)).square().mean().sqrt())


def trained(loss=EVEN, seed: int = 0, steps: int = 500) -> float:
    """Train a student and return its error."""
    torch.manual_seed(seed)
    student = Small()
    networks = Networks(student, TEACHER, None)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 20) * (1 + math.cos(math.pi * i / steps)) / 2
    )
    generator = torch.Generator().manual_seed(seed)
    times = partial(log_normal, mean=0.0)
    for step in range(steps):
        x_0, _ = TEACHER.sample(512, generator)
        terms = scm(
            networks,
            ImageBatch(x_0, Condition()),
            Phase(step, steps),
            generator,
            loss=loss,
            times=times,
            guidance_scale=fixed,
            warmup_steps=0,
        )
        optimizer.zero_grad()
        terms.total.backward()
        optimizer.step()
        schedule.step()
    return error_of(student)


def test_the_consistency_function_of_a_gaussian_is_learnt() -> None:
    torch.manual_seed(0)
    assert error_of(Small()) > 0.15
    assert trained() < 0.01


def test_a_difference_serves_as_a_tangent() -> None:
    way = partial(central_difference, step=1e-2)
    assert trained(partial(EVEN, tangent=way)) < 0.01


def test_one_pass_has_the_gradients_of_two() -> None:
    """With attention inside, whose tangent and gradient come from the same operation."""
    torch.manual_seed(0)
    network = SmallDiT(sample_size=4, width=16, num_layers=2, num_attention_heads=2)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student = Denoiser(network)
    x_t, t = torch.randn(6, 1, 4, 4), torch.linspace(0.2, 1.4, 6, dtype=torch.double)
    states = States(x_t, t, torch.randn(6, 1, 4, 4), Condition(), torch.ones(6).double())
    found = []
    for way in (functional, one_pass):
        network.zero_grad()
        total = partial(EVEN, tangent=way)(Networks(student, None, None), states, 1.0).total
        total.backward()
        grads = [p.grad.clone() for p in network.parameters() if p.grad is not None]
        found.append([total.detach(), *grads])
    assert max(float(g.abs().max()) for g in found[0]) > 1e-3
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_without_the_tangent_it_is_another_function() -> None:
    """The teacher's denoiser is learnt where nothing pulls along the path."""

    def still(F, x, t, x_dot, t_dot):
        return F(x, t).detach(), torch.zeros_like(x)

    assert trained(partial(EVEN, tangent=still)) > 0.03
    assert (
        trained(partial(EVEN, form=lambda F, F_T, x, J, t, r: scm_tangent(F, F_T, x, J, t, 0.0)))
        > 0.03
    )


@pytest.mark.parametrize("r", [0.0, 0.5])
def test_before_its_tangent_counts_it_learns_the_teacher(r: float) -> None:
    """Of values that are free at every state, whose J is 0, the minimum is F_T - r tan t x_t."""
    x_t, _ = TEACHER.sample(64, torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.8, 64, dtype=torch.double)
    F_T = TEACHER(x_t, t, Condition())
    states = States(x_t, t, F_T, Condition(), torch.ones_like(t))
    F = nn.Parameter(torch.zeros_like(x_t))
    optimizer = torch.optim.SGD([F], lr=0.1 * 64)
    for _ in range(30):
        optimizer.zero_grad()
        EVEN(Networks(lambda x, *_: F + 0 * x, None, None), states, r).total.backward()
        optimizer.step()
    expected = F_T - r * along(t.tan(), x_t) * x_t
    torch.testing.assert_close(F.detach(), expected, atol=1e-3, rtol=0)


def kept_states(scale: float) -> tuple[States, ImageBatch, GaussianMixture]:
    mixture = GaussianMixture([[1.0], [-1.0]], [0.3, 0.5]).requires_grad_(False)
    x_0, labels = mixture.sample(64, torch.Generator().manual_seed(0))
    batch = ImageBatch(x_0, Condition(labels=labels))
    seen: list[tuple[States, float]] = []

    def loss(networks: Networks, states: States, r: float) -> LossTerms:
        seen.append((states, r))
        return LossTerms(torch.zeros(()))

    scm(
        Networks(Small(), mixture, None),
        batch,
        Phase(5, 100),
        torch.Generator().manual_seed(3),
        loss=loss,
        times=log_normal,
        guidance_scale=partial(fixed, scale=scale),
        warmup_steps=10,
    )
    ((states, r),) = seen
    assert r == 0.5
    return states, batch, mixture


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_states_are_noised_data_with_the_guided_velocity(scale: float) -> None:
    states, batch, mixture = kept_states(scale)
    noise = (states.x_t - along(states.t.cos(), batch.x_0) * batch.x_0) / along(
        states.t.sin(), batch.x_0
    )
    assert abs(float(noise.mean())) < 0.4
    assert 0.7 < float(noise.std()) < 1.3
    expected = guided(mixture, states.x_t, states.t, batch.condition, states.guidance_scale)
    torch.testing.assert_close(states.velocity, expected)
    assert (states.guidance_scale == scale).all()
    assert torch.equal(kept_states(scale)[0].x_t, states.x_t)


class Broken(Small):
    """NaN where x is large."""

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        return super().forward(x, t, condition).where(x < 10, torch.nan)


def some_states(broken: int, count: int = 40) -> States:
    x_t = torch.linspace(-1, 1, count)[:, None].clone()
    x_t[:broken] = 20.0
    t = torch.linspace(0.1, 1.4, count, dtype=torch.double)
    scale = torch.ones(count, dtype=torch.double)
    return States(x_t, t, TEACHER(x_t, t, Condition()), Condition(), scale)


def test_states_without_a_finite_tangent_are_left_out_and_counted() -> None:
    torch.manual_seed(0)
    student = Broken()
    networks = Networks(student, TEACHER, None)
    terms = EVEN(networks, some_states(4), 1.0, max_nan_share=0.1)
    assert terms.terms["nan_share"] == pytest.approx(0.1)
    rest = some_states(4)
    rest = States(rest.x_t[4:], rest.t[4:], rest.velocity[4:], Condition(), rest.guidance_scale[4:])
    torch.testing.assert_close(terms.total, EVEN(networks, rest, 1.0).total)
    terms.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)


def test_too_many_of_them_stop_the_run() -> None:
    networks = Networks(Broken(), TEACHER, None)
    with pytest.raises(TrainingDiverged) as stop:
        EVEN(networks, some_states(10), 1.0, max_nan_share=0.1)
    assert str(stop.value) == (
        "the tangents of 25% of the states are not finite; expected at most "
        "method.loss.max_nan_share=10%; lower optimizer.learning_rate, or lengthen "
        "method.warmup_steps"
    )


def test_states_that_do_not_count() -> None:
    """Left out of the value, of the gradient, and of the learnt weights."""
    torch.manual_seed(0)
    student, u = Small(), nn.Linear(1, 1)

    def log_variance(t: Tensor) -> Tensor:
        return u(t.float()[:, None]).squeeze(1)

    states = some_states(0)
    kept = (torch.arange(40) < 30).float()
    part = States(
        *(getattr(states, f)[:30] for f in ("x_t", "t", "velocity")),
        Condition(),
        states.guidance_scale[:30],
    )
    gradients = []
    for given in (States(**{**vars(states), "kept": kept}), part):
        for module in (student, u):
            module.zero_grad()
        total = EVEN(Networks(student, TEACHER, log_variance), given, 1.0, weighting=by_noise).total
        total.backward()
        gradients.append(
            [total, *(p.grad.clone() for p in [*student.parameters(), *u.parameters()])]
        )
    torch.testing.assert_close(*gradients)


def test_warm_up() -> None:
    assert [warmed(i, 4) for i in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert warmed(0, 0) == 1.0


def test_it_needs_a_teacher() -> None:
    with pytest.raises(UserError, match="teacher=null: sCM distils a teacher; expected teacher="):
        scm(
            Networks(Small(), None, None),
            ImageBatch(torch.zeros(2, 1), Condition()),
            Phase(0, 1),
            torch.Generator(),
            loss=EVEN,
            times=log_normal,
            guidance_scale=fixed,
            warmup_steps=0,
        )
