"""SwiftBrush: adapters as a fake score, guided as their teacher is, and no data."""

import math
from functools import partial

import pytest
import torch
from generators import point_generator
from torch import Generator, Tensor

from stillhouse.diffusion.guidance import fixed, guided
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.times import shifted_uniform, uniform
from stillhouse.diffusion.trigflow import noised
from stillhouse.families.timestep.matching import critic, of_scaled_noise, score_difference
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.rollouts import backward_simulation
from stillhouse.families.timestep.swiftbrush import student
from stillhouse.objectives.distribution_matching import of_variance
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.records.losses import LossTerms
from stillhouse.teachers.fake_scores import lora

MATCHING = partial(
    score_difference, times=shifted_uniform, weighting=of_variance, fake_guidance_scale=None
)
ONE_STEP = partial(backward_simulation, times=[math.pi / 2])
GUIDED = partial(fixed, scale=4.5)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def prompts(count: int = 40) -> ImageBatch:
    # What the pictures hold is not read: NaN would be seen at once.
    x_0 = torch.full((count, 2), torch.nan)
    return ImageBatch(x_0, Condition(labels=torch.arange(count) % 4))


def networks() -> Networks:
    """Return a student that is not the teacher, and its adapters, as the family makes them."""
    teacher = point_generator(1).requires_grad_(False)
    torch.manual_seed(0)
    fake = lora(teacher, rank=2, alpha=4.0, target_modules=["embed", "head"])
    return Networks(point_generator(2), teacher, None, fake)


def student_loss(of: Networks, batch: ImageBatch | None = None, **changes) -> LossTerms:
    settings = {"rollout": ONE_STEP, "matching": MATCHING, "guidance_scale": GUIDED} | changes
    return student(of, batch or prompts(), Phase(0, 1), seeded(), **settings)


def critic_loss(of: Networks, batch: ImageBatch | None = None, **changes) -> LossTerms:
    settings = {
        "rollout": ONE_STEP,
        "guidance_scale": GUIDED,
        "times": shifted_uniform,
        "weighting": of_scaled_noise,
        "condition_dropout": 0.1,
    }
    return critic(of, batch or prompts(), Phase(0, 1), seeded(), **(settings | changes))


def with_gradient(network) -> list[str]:
    return [n for n, p in network.named_parameters() if p.grad is not None and (p.grad != 0).any()]


def learn_once(of: Networks) -> None:
    """Let the adapters take a step, from B = 0."""
    critic_loss(of).total.backward()
    with torch.no_grad():
        for parameter in of.fake_score.parameters():
            parameter -= 0.3 * parameter.grad
    of.fake_score.zero_grad()


def test_before_the_adapters_have_learnt_nothing_moves() -> None:
    """Exactly: both scores are one network's. After their first step the student does."""
    of = networks()
    student_loss(of).total.backward()
    assert with_gradient(of.student) == []
    learn_once(of)
    student_loss(of).total.backward()
    assert with_gradient(of.student)


def test_each_phase_has_its_own_gradients() -> None:
    """The student's is that of no adapter; the adapters' alone are those of the second, and on."""
    of = networks()
    learn_once(of)
    of.fake_score.requires_grad_(False)
    student_loss(of).total.backward()
    assert with_gradient(of.student)
    assert not [p for p in of.fake_score.parameters() if p.grad is not None]
    of.student.zero_grad()
    of.fake_score.requires_grad_(True)
    critic_loss(of).total.backward()
    assert len(with_gradient(of.fake_score)) == 4
    for network in (of.student, of.teacher):
        assert with_gradient(network) == []


def test_the_pull_is_the_difference_of_guided_noises() -> None:
    """dL/dF = -sin² t (ε_T - ε_F) / BD, by x_0 = -F(ε, π/2)."""
    of, batch = networks(), prompts()
    learn_once(of)
    pixels = torch.randn(40, 2, generator=seeded(3)).requires_grad_()
    free = Networks(lambda x, t, c, w: pixels, of.teacher, None, of.fake_score)
    (found,) = torch.autograd.grad(student_loss(free).total, pixels)
    generator = seeded()
    torch.randn(40, 2, generator=generator)
    t = shifted_uniform(40, generator)
    x_t = noised(-pixels.detach(), torch.randn(40, 2, generator=generator), t)
    scale = torch.full((40,), 4.5).double()
    with torch.no_grad():
        # ε = sin t x_t + cos t F.
        teacher, fake = (
            along(t.sin(), x_t) * x_t
            + along(t.cos(), x_t) * guided(network, x_t, t, batch.condition, scale)
            for network in (of.teacher, of.fake_score)
        )
    expected = -along(t.sin().square(), x_t) * (teacher - fake) / 80
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert found.abs().max() > 1e-4


def test_adapters_learn_the_noise_of_the_students_samples() -> None:
    """α² (ε_F - ε)² with α = cos t; a tenth of the samples without their condition."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def fake(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        assert condition.labels is not None
        seen.append((x, t, condition.labels))
        return torch.zeros_like(x)

    def still(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        return -torch.ones_like(x)

    loss = critic_loss(Networks(still, still, None, fake), prompts(2000))
    ((x_t, t, labels),) = seen
    cos, sin = along(t.cos(), x_t), along(t.sin(), x_t)
    noise = (x_t - cos) / sin
    torch.testing.assert_close(loss.total, (cos * (sin * x_t - noise)).square().mean())
    assert float((labels < 0).double().mean()) == pytest.approx(0.1, abs=0.02)


def test_what_an_iteration_costs() -> None:
    """Teacher: prompt and none; adapters: both, and once more when they learn; student: twice."""
    rows: dict[str, int] = {}

    def counted(name: str):
        def call(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            rows[name] = rows.get(name, 0) + len(x)
            return x

        return call

    of = Networks(counted("student"), counted("teacher"), None, counted("fake"))
    student_loss(of)
    assert rows == {"student": 40, "teacher": 80, "fake": 80}
    critic_loss(of)
    assert rows == {"student": 80, "teacher": 80, "fake": 120}


def test_the_teachers_law_stays_whatever_both_are_guided_by() -> None:
    """Of exact scores; guiding the teacher alone moves a student that is there already."""
    teacher = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], [0.5, 0.5])
    places, seen = torch.randn(40, 2, generator=seeded(3)).requires_grad_(), []
    of = Networks(lambda x, t, c, w: places, teacher, None, teacher)
    batch = ImageBatch(places.detach(), Condition(labels=torch.arange(40) % 2))
    for matching in (MATCHING, partial(MATCHING, fake_guidance_scale=1.0)):
        loss = student_loss(of, batch, matching=matching).total
        seen.append(float(torch.autograd.grad(loss, places)[0].abs().max()))
    assert seen[0] == 0 < 1e-3 < seen[1]


def test_a_scale_of_one_is_the_unguided_path() -> None:
    """And half the rows; near one it is the same gradient, in two halves."""
    of = networks()
    learn_once(of)
    parameters = list(of.student.parameters())
    one, near = (
        torch.autograd.grad(
            student_loss(
                of,
                guidance_scale=partial(fixed, scale=scale),
                matching=partial(MATCHING, times=uniform),
            ).total,
            parameters,
        )
        for scale in (1.0, 1 + 1e-7)
    )
    torch.testing.assert_close(one, near, rtol=1e-3, atol=1e-6)
