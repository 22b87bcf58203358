"""DMD2: which networks learn from which term, and what each is asked for."""

import math
from functools import partial

import pytest
import torch
from generators import point_generator
from torch import Generator, Tensor, nn

from stillhouse.diffusion.guidance import fixed
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.times import uniform
from stillhouse.families.timestep.dmd2 import critic, student
from stillhouse.families.timestep.matching import fake_score_loss, score_difference
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.rollouts import backward_simulation
from stillhouse.objectives.adversarial import non_saturating
from stillhouse.objectives.consistency import even
from stillhouse.objectives.distribution_matching import by_teacher_error, plain
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.records.losses import LossTerms
from stillhouse.students.discriminators import mlp_head, on_features
from stillhouse.teachers.fake_scores import full_copy

MATCHING = partial(score_difference, times=uniform, weighting=by_teacher_error)
ONE_STEP = partial(backward_simulation, times=[math.pi / 2])
BOTH = {
    "rollout": ONE_STEP,
    "guidance_scale": fixed,
    "adversarial": non_saturating(),
    "adversarial_times": uniform,
}


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def points(count: int = 40, dtype: torch.dtype = torch.float) -> ImageBatch:
    x_0 = torch.randn(count, 2, generator=seeded(5)).to(dtype)
    return ImageBatch(x_0, Condition(labels=torch.arange(count) % 4))


def networks() -> Networks:
    """Return networks that are all unlike, with gradients everywhere but in the teacher."""
    teacher = point_generator(1).requires_grad_(False)
    torch.manual_seed(0)
    head = on_features(
        teacher, features=["network.model.layers.0"], head=partial(mlp_head, hidden=4)
    )
    return Networks(point_generator(2), teacher, None, full_copy(point_generator(3)), head)


def student_loss(of: Networks, batch: ImageBatch | None = None, **changes) -> LossTerms:
    settings = BOTH | {"matching": MATCHING, "adversarial_weight": 0.3} | changes
    return student(of, batch or points(), Phase(0, 1), seeded(), **settings)


def critic_loss(of: Networks, batch: ImageBatch | None = None, **changes) -> LossTerms:
    settings = BOTH | {"times": uniform, "weighting": even, "adversarial_weight": 0.3} | changes
    return critic(of, batch or points(), Phase(0, 1), seeded(), **settings)


def let_learn(of: Networks, *names: str) -> None:
    """Give gradients to some networks, as the family does for a phase."""
    for name in ("student", "fake_score", "discriminator"):
        getattr(of, name).requires_grad_(name in names)


def moved(of: Networks) -> list[str]:
    """Return networks that have a gradient which is not 0."""
    found = []
    for name in ("student", "teacher", "fake_score", "discriminator"):
        gradients = [p.grad for p in getattr(of, name).parameters()]
        if any(g is not None and bool((g != 0).any()) for g in gradients):
            found.append(name)
    return found


def gradient(loss: Tensor, network) -> Tensor:
    found = torch.autograd.grad(loss, list(network.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


class Affine(nn.Module):
    """x_0 = μ + s ε in one step."""

    def __init__(self, mu: float, s: float) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.tensor(mu, dtype=torch.double))
        self.s = nn.Parameter(torch.tensor(s, dtype=torch.double))

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        return (along(t.cos(), x) * x - (self.mu + self.s * x)) / along(t.sin(), x)


@pytest.mark.parametrize(("mu", "s"), [(0.7, 1.3), (0.1, 1.1), (1.5, 1.8)])
def test_a_student_is_pulled_to_its_teachers_law(mu: float, s: float) -> None:
    """By the whole loss, of exact scores: not at all where it has that law.

    In sixteen coordinates: in one, the normaliser's 1 / |x_0 - f| has no mean.
    """
    teacher, fake = (GaussianMixture([[m] * 16], [d]) for m, d in ((0.7, 1.3), (mu, s)))
    of = Networks(Affine(mu, s), teacher, None, fake)
    batch = ImageBatch(torch.zeros(1000, 16, dtype=torch.double), Condition())
    loss = student_loss(of, batch, adversarial=None).total
    g_mu, g_s = gradient(loss, of.student).tolist()
    for g, away in ((g_mu, mu - 0.7), (g_s, s - 1.3)):
        assert g == 0 if away == 0 else g * away > 0


def test_a_student_is_trained_alone() -> None:
    """Neither term reaches another network's weights, and both reach its own."""
    of = networks()
    let_learn(of, "student")
    student_loss(of).total.backward()
    assert moved(of) == ["student"]


def test_fake_score_and_discriminator_are_trained_without_the_student() -> None:
    """Which has no gradient even if it could; heads learn, and what they stand on with them."""
    of = networks()
    let_learn(of, "student", "fake_score", "discriminator")
    critic_loss(of).total.backward()
    assert moved(of) == ["fake_score", "discriminator"]


def test_a_frozen_fake_score_passes_the_discriminators_gradient_on() -> None:
    """With a fake score that is the teacher, whose matching is exactly 0, it is all there is."""
    of = networks()
    let_learn(of, "student")
    of = Networks(of.student, of.teacher, None, of.teacher, of.discriminator)
    terms = student_loss(of)
    assert terms.terms["matching"] == 0
    assert gradient(terms.total, of.student).abs().max() > 1e-4
    alone = student_loss(of, adversarial=None).total
    assert gradient(alone, of.student).abs().max() == 0


@pytest.mark.parametrize(
    ("loss", "name", "terms"),
    [
        (student_loss, "student", ("matching", "adversarial")),
        (critic_loss, "fake_score", ("fake_score", "discriminator")),
    ],
)
def test_terms_are_added_by_their_weight(loss, name: str, terms: tuple[str, str]) -> None:
    """Values and gradients; without an adversarial loss, or a discriminator, the first is left."""
    of = networks()
    network = getattr(of, name)
    none, some, more = (loss(of, adversarial_weight=w) for w in (0.0, 0.3, 0.9))
    first, second = (some.terms[term] for term in terms)
    torch.testing.assert_close(some.total, first + 0.3 * second)
    g_none, g_some, g_more = (gradient(t.total, network) for t in (none, some, more))
    torch.testing.assert_close(g_more - g_none, 3 * (g_some - g_none), rtol=1e-3, atol=1e-6)
    assert (g_some - g_none).abs().max() > 1e-4
    headless = Networks(of.student, of.teacher, None, of.fake_score)
    for alone in (loss(of, adversarial=None), loss(headless)):
        assert list(alone.terms) == [terms[0]]
        torch.testing.assert_close(alone.total, none.total)


def test_a_fake_score_denoises_the_students_samples() -> None:
    """Those of the very noise, in x_0 = -F(ε, π/2), and no other data."""
    of, batch = networks(), points()
    found = critic_loss(of, batch, adversarial=None).total
    generator = seeded()
    noise = torch.randn(batch.x_0.shape, generator=generator)
    t = torch.full((len(noise),), math.pi / 2, dtype=torch.double)
    x_0 = -of.student(noise, t, batch.condition, torch.ones(len(noise)).double()).detach()
    expected = fake_score_loss(
        of, x_0, batch.condition, generator, times=uniform, weighting=even
    ).mean()
    torch.testing.assert_close(found, expected)
    other = critic_loss(of, ImageBatch(batch.x_0 + 9, batch.condition), adversarial=None).total
    torch.testing.assert_close(other, found)


def test_a_discriminator_is_asked_of_noised_samples_and_noised_data() -> None:
    """By the fake score's features; what it calls real is the batch."""
    asked: list[tuple[object, Tensor, Tensor]] = []

    def tells(trunk, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        asked.append((trunk, x_t, t))
        return x_t.mean(1, keepdim=True)

    of = networks()
    of = Networks(of.student, of.teacher, None, of.fake_score, tells)
    data = ImageBatch(torch.full((40, 2), 50.0), points().condition)
    near = {"adversarial_times": lambda count, generator: torch.full((count,), 0.1).double()}
    right = critic_loss(of, data, **near).terms["discriminator"]
    assert right < 1
    (_, fake, t), (_, real, _) = asked
    assert all(trunk is of.fake_score for trunk, _, _ in asked)
    assert (t == torch.tensor(0.1).double()).all()
    noise = (real - 50 * math.cos(0.1)) / math.sin(0.1)
    assert abs(float(noise.mean())) < 0.3
    assert float(noise.std()) == pytest.approx(1, abs=0.2)
    assert fake.abs().max() < 20
    wrong = critic_loss(of, ImageBatch(-data.x_0, data.condition), **near).terms["discriminator"]
    assert wrong > 40
    # The student is to look real.
    asked.clear()
    found = student_loss(of, data, **near).terms["adversarial"]
    torch.testing.assert_close(found, nn.functional.softplus(-asked[0][1].mean(1)).mean())


def test_the_teacher_is_guided_and_the_student_conditioned_on_the_scale() -> None:
    """Two rows a sample of the teacher, one of the fake score; the scale is the student's input."""
    rows: dict[str, list[int]] = {"teacher": [], "fake": [], "student": []}
    scales: list[Tensor] = []

    def counted(name: str):
        network = point_generator(1)

        def call(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
            rows[name].append(len(x))
            if name == "student":
                scales.append(scale)
            return network(x, t, condition)

        return call

    of = Networks(counted("student"), counted("teacher"), None, counted("fake"))
    guided = {"guidance_scale": partial(fixed, scale=2.5), "adversarial": None}
    student_loss(of, **guided)
    assert rows == {"teacher": [80], "fake": [40], "student": [40]}
    critic_loss(of, **guided)
    assert rows == {"teacher": [80], "fake": [40, 40], "student": [40, 40]}
    assert all((scale == 2.5).all() for scale in scales)


def test_several_steps_learn_by_their_last() -> None:
    """Of a grid of one time it is the one-step loss at every turn; of more, at some."""
    of, losses = networks(), []
    for times in ([math.pi / 2], [math.pi / 2, 1.0]):
        rollout = partial(backward_simulation, times=times)
        settings = BOTH | {"matching": partial(MATCHING, weighting=plain), "rollout": rollout}
        losses.append(
            [
                student(
                    of, points(), Phase(0, 9, u), seeded(), **settings, adversarial_weight=0.0
                ).total
                for u in range(8)
            ]
        )
    one, two = (torch.stack(values) for values in losses)
    assert (one == one[0]).all()
    assert 0 < int((two == one).sum()) < 8
