"""SANA-Sprint: consistency and its adversary, each alone and together; what the heads see."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from generators import point_generator
from torch import Generator, Tensor, nn
from torch.nn.functional import relu

from stillhouse.diffusion.guidance import fixed, one_of
from stillhouse.diffusion.tangents import functional
from stillhouse.diffusion.times import log_normal
from stillhouse.diffusion.trigflow import denoised, noised
from stillhouse.errors import UserError
from stillhouse.families.timestep import sana_sprint
from stillhouse.families.timestep.consistency import consistency
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.scm import scm
from stillhouse.objectives.adversarial import hinge
from stillhouse.objectives.consistency import even, scm_tangent
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.records.losses import LossTerms
from stillhouse.students.discriminators import mlp_head, on_features

TIMES, SCALES = partial(log_normal, mean=0.7), partial(one_of, scales=[1.0, 2.0, 3.0])
SCM = partial(
    scm,
    loss=partial(consistency, tangent=functional, form=scm_tangent, weighting=even),
    times=TIMES,
    guidance_scale=SCALES,
    warmup_steps=0,
)
ADVERSARIAL = {
    "times": TIMES,
    "guidance_scale": SCALES,
    "adversarial": hinge(),
    "adversarial_times": partial(log_normal, mean=0.1, std=1.0),
    "max_time_probability": 0.5,
}
Loss = Callable[[Networks, ImageBatch, Phase, Generator], LossTerms]


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def batch(count: int = 16, dtype: torch.dtype = torch.float) -> ImageBatch:
    x_0 = torch.randn(count, 2, generator=seeded(5)).to(dtype)
    return ImageBatch(x_0, Condition(labels=torch.arange(count) % 4))


def networks(student: Any = None, discriminator: Any = None) -> Networks:
    """Return a student, a frozen teacher unlike it, and heads on two of its layers."""
    teacher = point_generator(1).requires_grad_(False)
    torch.manual_seed(0)
    features = ["network.model.embed", "network.model.layers.0"]
    heads = on_features(teacher, features=features, head=partial(mlp_head, hidden=4))
    student = student or point_generator(2).requires_grad_(True)
    return Networks(student, teacher, None, None, discriminator or heads)


def of_both(consistency_weight: float = 1.0, adversarial_weight: float = 0.5, **changes) -> Loss:
    options = {
        "consistency": SCM,
        "consistency_weight": consistency_weight,
        "adversarial_weight": adversarial_weight,
    }
    return partial(sana_sprint.student, **(ADVERSARIAL | options | changes))


def of_heads(**changes: Any) -> Loss:
    return partial(sana_sprint.critic, **(ADVERSARIAL | {"misaligned": False} | changes))


def asked(loss: Loss, of: Networks, seed: int = 2, given: ImageBatch | None = None) -> LossTerms:
    return loss(of, given or batch(), Phase(0, 1), seeded(seed))


def weights_behind(loss: Loss, steps: int = 6) -> list[Tensor]:
    """Return a student's weights behind some steps, one behind the other."""
    of, found, generator = networks(), [], seeded(1)
    student: Any = of.student
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    for step in range(steps):
        optimizer.zero_grad()
        loss(of, batch(), Phase(step, steps), generator).total.backward()
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in student.parameters()]))
    return found


def test_without_an_adversary_it_is_scm() -> None:
    """Step by step, bit for bit."""
    expected = weights_behind(SCM)
    found = weights_behind(of_both(adversarial_weight=0.0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(weights_behind(of_both())[-1], expected[-1])


def test_without_consistency_heads_alone_teach() -> None:
    """-λ mean D of jumps that are noised again; neither a tangent nor the teacher's velocity."""

    def untouched(*_: Any) -> LossTerms:
        raise AssertionError

    of = networks()
    found = asked(of_both(0.0, 0.5, consistency=untouched), of)
    assert set(found.terms) == {"adversarial"}
    generator = seeded(2)
    x_0 = sana_sprint.jumps(of, batch(), generator, TIMES, SCALES, 0.5)
    s = ADVERSARIAL["adversarial_times"](16, generator)
    noise = torch.randn(16, 2, generator=generator)
    assert of.discriminator is not None
    logits = of.discriminator(of.teacher, noised(x_0, noise, s), s, batch().condition)
    torch.testing.assert_close(found.total, -0.5 * logits.mean())


def test_both_terms_are_added() -> None:
    of, generator = networks(), seeded(2)
    parts = [loss(of, batch(), Phase(0, 1), generator).total for loss in (SCM, of_both(0.0, 0.5))]
    whole = asked(of_both(2.0, 0.5), of)
    torch.testing.assert_close(whole.total, 2 * parts[0] + parts[1])
    assert set(whole.terms) == {"tangent_norm", "nan_share", "adversarial"}


class Noted(nn.Module):
    """A network that keeps what it was asked for."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self.asked: list[tuple[Tensor, Tensor, Condition, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        self.asked.append((x, t, condition, guidance_scale))
        return self.network(x, t, condition, guidance_scale)


def jumped(probability: float, count: int = 400) -> tuple[Tensor, ...]:
    """Return the jumps of some data, and what the student was asked for: x_t, t, scales."""
    student, given = Noted(point_generator(2)), batch(count)
    of = networks(student)
    x_0 = sana_sprint.jumps(of, given, seeded(3), TIMES, SCALES, probability)
    ((x_t, t, condition, scale),) = student.asked
    assert condition is given.condition
    expected = denoised(x_t, point_generator(2)(x_t, t, given.condition, scale), t)
    torch.testing.assert_close(x_0, expected)
    return x_t, t, scale


def test_jumps_begin_at_pure_noise_with_their_probability() -> None:
    """0: at none, as they are drawn; 1: at all; 0.5: at every other, and where drawn otherwise."""
    drawn = TIMES(400, seeded(3))
    last = torch.full((400,), math.pi / 2, dtype=torch.double)
    assert torch.equal(jumped(0.0)[1], drawn)
    x_t, t, _ = jumped(1.0)
    assert torch.equal(t, last)
    assert abs(float((x_t * batch(400).x_0).mean())) < 0.1, "data are left in noise"
    _, t, _ = jumped(0.5)
    assert torch.equal(t.where(t != last, drawn), drawn)
    assert float((t == last).double().mean()) == pytest.approx(0.5, abs=0.1)


def test_a_student_is_conditioned_on_the_scale_that_its_teacher_was_guided_by() -> None:
    """Each of them, in consistency and in jumps."""
    assert set(jumped(0.5)[2].tolist()) == {1.0, 2.0, 3.0}
    student = Noted(point_generator(2))
    asked(of_both(), networks(student))
    scales = [scale for *_, scale in student.asked]
    assert len(scales) > 1
    assert all(scale.shape == (16,) for scale in scales)
    assert all(set(scale.tolist()) <= {1.0, 2.0, 3.0} for scale in scales)


def test_the_adversarial_gradient_reaches_the_student_through_the_frozen_teacher() -> None:
    """Also where all jumps begin at pure noise, where consistency says nothing."""
    of = networks()
    parts: Any = (of.student, of.teacher, of.discriminator)
    student, teacher, heads = parts
    heads.requires_grad_(False)
    asked(of_both(0.0, max_time_probability=1.0), of).total.backward()
    assert all(p.grad is None for p in [*teacher.parameters(), *heads.parameters()])
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert max(float(g.abs().max()) for g in gradients) > 1e-4
    last = partial(fixed, scale=math.pi / 2)
    student.zero_grad()
    asked(of_both(1.0, 0.0, consistency=partial(SCM, times=last)), of).total.backward()
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) < 1e-6


def test_the_critic_teaches_heads_alone() -> None:
    """Which stand on the teacher's features; the student has no gradient even if it could."""
    of = networks()
    parts: Any = (of.student, of.teacher, of.discriminator)
    student, teacher, heads = parts
    before = copy.deepcopy(teacher.state_dict())
    asked(of_heads(misaligned=True), of).total.backward()
    assert all(p.grad is None for p in [*student.parameters(), *teacher.parameters()])
    assert all(p.grad is not None for p in heads.parameters())
    assert all(torch.equal(t, before[n]) for n, t in teacher.state_dict().items())


class Fixed(nn.Module):
    """Heads that keep what they are asked for, and return given logits, in turn."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))
        self.asked: list[tuple[Any, Tensor, Tensor, Condition]] = []

    def forward(self, trunk: Any, x: Tensor, s: Tensor, condition: Condition) -> Tensor:
        self.asked.append((trunk, x, s, condition))
        return self.logits[len(self.asked) - 1].expand(len(x), 3)


@pytest.mark.parametrize(
    ("fake", "real", "loss", "slopes"),
    [
        (0.0, 0.0, 1.0, (0.5, -0.5)),
        (-1.5, 1.5, 0.0, (0.0, 0.0)),
        (2.0, -1.0, 2.5, (0.5, -0.5)),
        (-2.0, 0.5, 0.25, (0.0, -0.5)),
    ],
)
def test_values_of_the_hinge(fake: float, real: float, loss: float, slopes) -> None:
    """(relu(1 + fake) + relu(1 - real)) / 2: 1 for logits of 0, 0 behind the margin."""
    heads = Fixed(fake, real)
    found = asked(of_heads(), networks(discriminator=heads)).total
    found.backward()
    assert float(found.detach()) == pytest.approx(loss)
    assert heads.logits.grad is not None
    assert tuple(heads.logits.grad.tolist()) == pytest.approx(slopes)


def test_samples_and_data_are_noised_to_the_same_times_with_other_noise() -> None:
    """By the teacher's features, of jumps without a gradient; data are the batch's."""
    heads = Fixed(0.0, 0.0)
    of, given = networks(discriminator=heads), batch(dtype=torch.double)
    of = Networks(Noted(lambda x, *_: 0.3 - x), of.teacher, None, None, heads)
    asked(of_heads(max_time_probability=1.0), of, given=given)
    (trunk, x_fake, s, _), (other, x_real, s_real, said) = heads.asked
    assert trunk is other is of.teacher
    assert torch.equal(s, s_real)
    assert s.unique().numel() == 16
    assert said is given.condition
    cos, sin = s.cos()[:, None], s.sin()[:, None]
    noise = (x_real - cos * given.x_0) / sin
    # Of jumps from pure noise: x_0 = -F = ε' - 0.3.
    of_fake = (x_fake - cos * (of.student.asked[0][0] - 0.3)) / sin
    for found in (noise, of_fake):
        assert 0.6 < float(found.std()) < 1.4
    assert abs(float((noise * of_fake).mean())) < 0.5
    assert not x_fake.requires_grad


def test_data_of_another_condition_are_fake_as_well() -> None:
    """The same noised data, each with the condition of the one before it: half of all fakes."""
    heads = Fixed(0.5, 0.0, -0.2)
    of, given = networks(discriminator=heads), batch()
    found = asked(of_heads(misaligned=True), of).total
    (_, _, s, said), (_, x_real, s_real, _), (_, x, s_mis, wrong) = heads.asked
    assert torch.equal(x, x_real)
    assert torch.equal(s, s_real)
    assert torch.equal(s, s_mis)
    assert said.labels is not None
    assert wrong.labels is not None
    assert torch.equal(wrong.labels, said.labels.roll(1))
    assert torch.equal(given.condition.labels, said.labels)
    fake = relu(1 + torch.tensor([0.5, -0.2])).mean()
    assert float(found.detach()) == pytest.approx(float((fake + 1) / 2))
    heads = Fixed(0.5, 0.0)
    asked(of_heads(), networks(discriminator=heads))
    assert len(heads.asked) == 2


@pytest.mark.parametrize("lacking", ["teacher", "discriminator"])
@pytest.mark.parametrize("loss", [of_both(0.0), of_heads()])
def test_it_needs_heads_and_a_teacher(loss: Loss, lacking: str) -> None:
    of = networks()
    parts = {"teacher": of.teacher, "discriminator": of.discriminator} | {lacking: None}
    with pytest.raises(UserError) as refusal:
        asked(loss, Networks(of.student, parts["teacher"], None, None, parts["discriminator"]))
    assert str(refusal.value) == (
        "stages.<stage>.family.discriminator=null: SANA-Sprint has heads on its teacher; expected "
        "a teacher, and +discriminator@stages.<stage>.family.discriminator=convolutional_heads"
    )


def test_a_sample_of_the_same_condition_is_not_called_misaligned() -> None:
    """Real data under their own condition are real; without conditions none is misaligned."""
    labels = torch.tensor([1, 1, 0, 0])
    condition = Condition(labels=labels)
    wrong = condition.differs(condition.rolled())
    assert wrong.tolist() == [True, False, True, False]
    assert Condition().differs(Condition()).numel() == 0
    states = torch.arange(24.0).view(4, 3, 2)
    captions = Condition(embeddings=states, mask=torch.ones(4, 3, dtype=torch.bool))
    assert captions.differs(captions.rolled()).all()
    assert not captions.differs(captions).any()
