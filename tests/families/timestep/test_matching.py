"""What a matched student is pulled by, of Gaussians exactly, and what its fake score learns."""

import math
from itertools import product

import pytest
import torch
from torch import Generator, Tensor, nn

from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.times import shifted_uniform, uniform
from stillhouse.diffusion.trigflow import denoised, noised
from stillhouse.errors import UserError
from stillhouse.families.timestep.matching import (
    fake_score_loss,
    of_noise,
    of_scaled_noise,
    score_difference,
)
from stillhouse.families.timestep.networks import Networks
from stillhouse.objectives.consistency import even
from stillhouse.objectives.distribution_matching import by_teacher_error, of_variance, plain
from stillhouse.records.diffusion import Condition

# The card's example: N(m, v²), and a student μ + s z.
M, V = 0.7, 1.3
TEACHER = GaussianMixture([[M]], [V])
PAIR = GaussianMixture([[1.0, 0.5], [-1.0, 0.0]], [0.5, 0.5])
WEIGHTINGS = [plain, of_variance, by_teacher_error]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def at(t: float):
    return lambda count, generator: torch.full((count,), t, dtype=torch.double)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.double)


def pull(teacher, fake, x_0: Tensor, condition: Condition, scale: float | Tensor = 1.0, **options):
    """Return D dL/dx_0, which is g."""
    x_0 = x_0.detach().requires_grad_()
    scales = scale if isinstance(scale, Tensor) else torch.full((len(x_0),), scale).double()
    options = {"times": uniform, "weighting": plain} | options
    networks = Networks(teacher, teacher, None, fake)
    loss = score_difference(networks, x_0, condition, scales, seeded(1), **options)
    return x_0.shape[1] * torch.autograd.grad(loss.sum(), x_0)[0]


def slopes(mu: float, s: float, t: float, weighting=plain) -> tuple[float, float]:
    """Return E[g] and E[g z], the gradient in μ and s: without error, for g is a + b z + c ε."""
    z, noise = normal(8, 1), normal(8, 1, seed=1)
    fake = GaussianMixture([[mu]], [s])
    g = pull(TEACHER, fake, mu + s * z, Condition(), times=at(t), weighting=weighting)
    columns = torch.cat([torch.ones_like(z), z, noise], 1)
    found = torch.linalg.lstsq(columns, g)
    torch.testing.assert_close(columns @ found.solution, g)
    a, b, _ = found.solution[:, 0].tolist()
    return a, b


def divergence(mu: float, s: float, t: float) -> float:
    """Return KL(student, teacher) at the time t."""
    p, q = (d**2 * math.cos(t) ** 2 + math.sin(t) ** 2 for d in (s, V))
    apart = math.cos(t) * (mu - M)
    return (math.log(q / p) + (p + apart**2) / q - 1) / 2


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_where_both_scores_are_one_nothing_pulls(weighting, scale: float) -> None:
    """Exactly, at any sample and time, guided as well if the fake score is guided alike."""
    x_0, said = 3 * normal(50, 2), Condition(labels=torch.arange(50) % 2)
    options = {"weighting": weighting, "fake_guidance_scale": None}
    assert (pull(PAIR, PAIR, x_0, said, scale, **options) == 0).all()
    other = pull(PAIR, PAIR, x_0, said.rolled(), 2.0, weighting=weighting)
    assert other.abs().max() > 0.1


@pytest.mark.parametrize(("mu", "s"), [(0.1, 1.1), (1.5, 0.4), (-2.0, 2.0)])
@pytest.mark.parametrize("t", [math.atan(0.9), 0.3, 1.4])
def test_the_gradient_is_that_of_the_divergence(mu: float, s: float, t: float) -> None:
    """E[g (1, z)] = w tan² t dKL/d(μ, s), by finite differences; w = 1 or cos t sin t."""
    step = 1e-5
    expected = [
        (divergence(mu + step * a, s + step * b, t) - divergence(mu - step * a, s - step * b, t))
        / (2 * step)
        for a, b in ((1, 0), (0, 1))
    ]
    for weighting, weight in ((plain, 1.0), (of_variance, math.cos(t) * math.sin(t))):
        found = [g / (weight * math.tan(t) ** 2) for g in slopes(mu, s, t, weighting)]
        assert found == pytest.approx(expected, rel=1e-6)


def test_the_cards_figures() -> None:
    """σ = 0.9 without scaling is tan t = 0.9 here, and the divergence that of the scaled laws."""
    g_mu, g_s = (g / 0.81 for g in slopes(0.1, 1.1, math.atan(0.9)))
    assert g_mu == pytest.approx(-0.2400, abs=5e-5)
    assert g_s == pytest.approx(-0.1046, abs=5e-5)
    # s = v: -σ² / (v² + σ²) (m - μ).
    assert slopes(0.1, V, math.atan(0.9))[0] == pytest.approx(-0.81 / (V**2 + 0.81) * 0.6)


@pytest.mark.parametrize("weighting", [plain, of_variance])
def test_the_teachers_law_is_the_only_one_that_stays(weighting) -> None:
    """Everywhere else the mean is pulled to the teacher's, and the deviation to its deviation."""
    for mu, s, t in product([-1.0, M, 2.0], [0.3, V, 2.5], [0.2, 0.8, 1.4]):
        g_mu, g_s = slopes(mu, s, t, weighting)
        for g, away in ((g_mu, mu - M), (g_s, s - V)):
            assert abs(g) < 1e-12 if away == 0 else g * away > 0
    mu, s = -1.0, 0.3
    for _ in range(60):
        g_mu, g_s = slopes(mu, s, 1.0, weighting)
        mu, s = mu - g_mu, s - g_s
    assert (mu, s) == pytest.approx((M, V), abs=1e-4)


def test_modes_are_sought() -> None:
    """A Gaussian between two modes, at the card's σ = 0.3, settles on one and is as narrow."""
    modes = GaussianMixture([[-2.0], [2.0]], [0.3, 0.3])
    z = torch.special.ndtri((torch.arange(400).double() + 0.5) / 400)[:, None]
    mu, s = 0.5, 0.5
    for _ in range(150):
        fake = GaussianMixture([[mu]], [s])
        g = pull(modes, fake, mu + s * z, Condition(), times=at(math.atan(0.3)))
        mu, s = mu - float(g.mean()), s - float((g * z).mean())
    assert (mu, s) == pytest.approx((2.0, 0.3), abs=0.03)


def test_what_pulls_is_the_difference_at_noised_samples() -> None:
    """g / D of the samples' own times and noise: neither scores nor noising have a gradient."""
    x_0, D = normal(30, 3), 3
    teacher, fake = GaussianMixture([[1.0, 0.0, 0.5]], [0.4]), GaussianMixture([[0.0] * 3], [0.9])
    found = pull(teacher, fake, x_0, Condition(), times=shifted_uniform) / D
    generator = seeded(1)
    t = shifted_uniform(30, generator)
    noise = torch.randn(x_0.shape, generator=generator, dtype=torch.double)
    x_t = noised(x_0, noise, t)
    g = denoised(x_t, fake(x_t, t, Condition()), t) - denoised(x_t, teacher(x_t, t, Condition()), t)
    torch.testing.assert_close(found, g / D)


def test_only_the_samples_have_a_gradient() -> None:
    """A fake score's weights learn by its own loss, and neither network keeps a graph before."""
    torch.manual_seed(0)
    teacher, fake = Line(), Line()
    outputs: list[Tensor] = []
    for network in (teacher, fake):
        network.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    networks, x_0 = Networks(teacher, teacher, None, fake), normal(6, 1).requires_grad_()
    loss = score_difference(
        networks, x_0, Condition(), torch.ones(6), seeded(0), times=uniform, weighting=plain
    )
    loss.sum().backward()
    assert x_0.grad is not None
    assert [output.requires_grad for output in outputs] == [False, False]
    assert all(p.grad is None for p in [*teacher.parameters(), *fake.parameters()])
    fake_score_loss(
        networks, x_0.detach(), Condition(), seeded(0), times=uniform, weighting=even
    ).sum().backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad is not None for p in fake.parameters())


@pytest.mark.parametrize("fake_scale", [1.0, None])
def test_a_scale_of_one_is_the_unguided_path(fake_scale: float | None) -> None:
    """Of the samples that have it, whatever the others have."""
    fake, said = GaussianMixture([[0.3, 0], [-0.2, 0]], [0.9, 0.8]), torch.arange(40) % 2
    condition, x_0 = Condition(labels=said), normal(40, 2)
    mixed = torch.ones(40).double()
    mixed[20:] = 3.0
    one, other = (
        pull(PAIR, fake, x_0, condition, scale, fake_guidance_scale=fake_scale)
        for scale in (1.0, mixed)
    )
    torch.testing.assert_close(one[:20], other[:20])
    assert (one[20:] - other[20:]).abs().max() > 0.1


def test_without_guidance_the_condition_is_not_read() -> None:
    """κ = 0 of both scores; of the teacher alone it still is, by the fake score."""
    fake = GaussianMixture([[0.3, 0], [-0.2, 0]], [0.9, 0.8])
    first, second = (Condition(labels=torch.full((40,), label)) for label in (0, 1))
    for fake_scale, alike in ((None, True), (1.0, False)):
        a, b = (
            pull(PAIR, fake, normal(40, 2), said, 0.0, fake_guidance_scale=fake_scale)
            for said in (first, second)
        )
        assert (float((a - b).abs().max()) < 1e-12) == alike


def test_a_fake_score_is_guided_only_if_it_is_said_so() -> None:
    """DMD2 guides the teacher alone: two rows a sample and one; SwiftBrush guides both."""
    x_0, condition = normal(10, 2), Condition(labels=torch.arange(10) % 2)
    for fake_scale, expected in ((1.0, [20, 10]), (None, [20, 20]), (2.0, [20, 20])):
        rows: list[int] = []

        def counted(x: Tensor, t: Tensor, said: Condition, scale=None, rows=rows) -> Tensor:
            rows.append(len(x))
            return PAIR(x, t, said)

        pull(counted, counted, x_0, condition, 4.5, fake_guidance_scale=fake_scale)
        assert rows == expected


def test_a_point_has_score_distillation_for_its_gradient() -> None:
    """A student of one sample: ε_F is the noise itself, and g = sin² t (ε_T - ε)."""
    point, x_0 = GaussianMixture([[0.3]], [1e-7]), torch.full((200, 1), 0.3, dtype=torch.double)
    g = pull(TEACHER, point, x_0, Condition(), weighting=of_variance)
    generator = seeded(1)
    t = uniform(200, generator)
    noise = torch.randn(200, 1, generator=generator, dtype=torch.double)
    x_t = noised(x_0, noise, t)
    f = denoised(x_t, TEACHER(x_t, t, Condition()), t)
    sin = along(t.sin(), x_t)
    torch.testing.assert_close(g, sin * (x_t - along(t.cos(), x_t) * f) - sin.square() * noise)


class Line(nn.Module):
    """F = a + b x."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, dtype=torch.double)

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        return self.layer(x)


def fitted(x_0: Tensor, t: float) -> Line:
    """Return what learns a time to the end, of some samples, always with the same noise."""
    torch.manual_seed(0)
    fake = Line()
    optimizer = torch.optim.LBFGS(fake.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        networks = Networks(fake, TEACHER, None, fake)
        losses = fake_score_loss(
            networks, x_0, Condition(), seeded(7), times=at(t), weighting=of_scaled_noise
        )
        losses.mean().backward()
        return losses.mean()

    optimizer.step(closure)
    return fake.requires_grad_(False)


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_a_fake_score_learns_the_denoiser_of_the_students_law(t: float) -> None:
    """A student's that is not the teacher's; what is left is the fit's own error."""
    fake = fitted(0.1 + 0.5 * normal(20_000, 1), t)
    x_t, times = normal(200, 1), torch.full((200,), t, dtype=torch.double)
    exact = GaussianMixture([[0.1]], [0.5])
    error = fake(x_t, times, Condition()) - exact(x_t, times, Condition())
    assert error.abs().max() < 0.06
    assert (TEACHER(x_t, times, Condition()) - exact(x_t, times, Condition())).abs().max() > 0.2


def test_at_the_teachers_law_nothing_pulls_in_the_mean() -> None:
    """With a fake score that was learnt; single samples are pulled, by the fit's error."""
    t = 1.0
    for mu in (M, M - 0.3):
        fake = fitted(mu + V * normal(20_000, 1), t)
        x_0 = mu + V * normal(20_000, 1, seed=3)
        g = pull(TEACHER, fake, x_0, Condition(), times=at(t))
        assert float(g.mean()) == pytest.approx(slopes(mu, V, t)[0], abs=0.02)
        assert g.abs().max() > 1e-3
    assert slopes(M - 0.3, V, t)[0] < -0.1


def test_weightings_of_the_fake_scores_error() -> None:
    """‖x_0 - f‖² / sin² t, (ε_F - ε)² and cos² t (ε_F - ε)²: of one network, by their words."""
    seen: list[tuple[Tensor, Tensor]] = []

    def fake(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        seen.append((x, t))
        return torch.tanh(x)

    x_0 = normal(30, 2)
    networks = Networks(fake, TEACHER, None, fake)
    for weighting in (even, of_noise, of_scaled_noise):
        losses = fake_score_loss(
            networks, x_0, Condition(), seeded(2), times=uniform, weighting=weighting
        )
        x_t, t = seen[-1]
        cos, sin = along(t.cos(), x_t), along(t.sin(), x_t)
        noise = (x_t - cos * x_0) / sin
        off = (sin * x_t + cos * torch.tanh(x_t) - noise).square()
        expected = {
            even: ((x_0 - denoised(x_t, torch.tanh(x_t), t)) / sin).square(),
            of_noise: off,
            of_scaled_noise: cos.square() * off,
        }[weighting]
        torch.testing.assert_close(losses, expected.mean(1))


def test_conditions_are_dropped_from_a_share_of_the_samples() -> None:
    said: list[Tensor] = []

    def fake(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        assert condition.labels is not None
        said.append(condition.labels)
        return x

    condition = Condition(labels=torch.arange(5000) % 4)
    for share in (0.0, 0.1):
        fake_score_loss(
            Networks(fake, fake, None, fake),
            normal(5000, 1),
            condition,
            seeded(0),
            times=uniform,
            weighting=even,
            condition_dropout=share,
        )
        dropped = said[-1] < 0
        assert float(dropped.double().mean()) == pytest.approx(share, abs=0.015)
        assert torch.equal(said[-1][~dropped], condition.labels[~dropped])


def settled(scale: float, fake_scale: float | None, steps: int = 50) -> tuple[float, float]:
    """Return mean and deviation of the second class where a student of two comes to rest.

    N(-1, 1) and N(1, 1), the student's scores exact, log σ even from 0.05 to 3; by symmetry the
    first class is the second's mirror image.
    """
    teacher = GaussianMixture([[-1.0], [1.0]], [1.0, 1.0])
    condition = Condition(labels=torch.ones(400).long())
    z = torch.special.ndtri((torch.arange(400).double() + 0.5) / 400)[:, None]
    sigma = torch.logspace(math.log10(0.05), math.log10(3), 400, dtype=torch.double)
    times = torch.atan(sigma[torch.randperm(400, generator=seeded(3))])
    mu, s = 1.3, 0.8
    for _ in range(steps):
        fake = GaussianMixture([[-mu], [mu]], [s, s])
        g = pull(
            teacher,
            fake,
            mu + s * z,
            condition,
            scale,
            times=lambda count, generator: times,
            fake_guidance_scale=fake_scale,
        )
        mu, s = mu - float(g.mean()), s - float((g * z).mean())
    return mu, s


def test_guidance_of_the_teacher_alone_moves_classes_apart() -> None:
    """Outwards and narrower, the more the larger κ is; κ = 1, and both guided, leave them."""
    found = [settled(scale, 1.0) for scale in (1.0, 1.5, 2.0, 3.0)]
    assert found[0] == pytest.approx((1.0, 1.0), abs=0.02)
    means, deviations = zip(*found, strict=True)
    assert sorted(means) == list(means)
    assert sorted(deviations, reverse=True) == list(deviations)
    assert 1.8 < means[3] < 2.2
    assert settled(3.0, None) == pytest.approx((1.0, 1.0), abs=0.02)


@pytest.mark.parametrize("lacking", ["teacher", "fake_score"])
def test_it_needs_both(lacking: str) -> None:
    networks = {"teacher": TEACHER, "fake_score": TEACHER} | {lacking: None}
    with pytest.raises(UserError, match=f"{lacking}=null: distribution matching"):
        score_difference(
            Networks(TEACHER, log_variance=None, **networks),
            normal(2, 1),
            Condition(),
            torch.ones(2),
            seeded(0),
            times=uniform,
            weighting=plain,
        )
