"""rCM: consistency and distribution matching, each alone and together, by closed forms."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from point_maps import PointMap
from torch import Generator, Tensor, nn

from stillhouse.diffusion.guidance import fixed, guided
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.tangents import functional
from stillhouse.diffusion.times import log_normal
from stillhouse.diffusion.trigflow import denoised, noised
from stillhouse.families.timestep import dmd2, matching, rcm
from stillhouse.families.timestep.consistency import consistency
from stillhouse.families.timestep.matching import score_difference
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.rollouts import backward_simulation, falling
from stillhouse.families.timestep.scm import scm
from stillhouse.objectives.consistency import TangentForm, even, rcm_tangent, scm_tangent
from stillhouse.objectives.distribution_matching import by_teacher_error
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.records.losses import LossTerms

TEACHER = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], [0.3, 0.6]).requires_grad_(False)
FAKE = GaussianMixture([[0.4, 0.2], [-0.8, 0.1]], [0.5, 0.4]).requires_grad_(False)
LOSS = partial(consistency, tangent=functional, form=scm_tangent, weighting=even)
MATCHING = partial(score_difference, times=log_normal, weighting=by_teacher_error)
SCM = partial(
    scm,
    loss=LOSS,
    times=partial(log_normal, mean=-0.8),
    guidance_scale=partial(fixed, scale=2.0),
    warmup_steps=0,
)
MATCHED = {
    "guidance_scale": partial(fixed, scale=2.0),
    "rollout": partial(falling, times=log_normal, most_steps=3),
    "matching": MATCHING,
}
Loss = Callable[[Networks, ImageBatch, Phase, Generator], LossTerms]


def batch(count: int = 16) -> ImageBatch:
    x_0, labels = TEACHER.sample(count, Generator().manual_seed(7))
    return ImageBatch(x_0, Condition(labels=labels))


def networks(student: Any) -> Networks:
    return Networks(student, TEACHER, None, FAKE)


def of_both(consistency_weight: float = 1.0, matching_weight: float = 0.3, **changes: Any) -> Loss:
    options = {
        "consistency": SCM,
        "consistency_weight": consistency_weight,
        "matching_weight": matching_weight,
        "matching_from": 0,
    }
    return partial(rcm.student, **(MATCHED | options | changes))


def weights_behind(loss: Loss, steps: int = 6) -> list[list[Tensor]]:
    """Return a student's weights behind each of some steps."""
    torch.manual_seed(0)
    student, found = PointMap(classes=2), []
    optimizer = torch.optim.Adam(student.parameters(), lr=0.01)
    generator = Generator().manual_seed(1)
    for step in range(steps):
        optimizer.zero_grad()
        loss(networks(student), batch(), Phase(step, steps), generator).total.backward()
        optimizer.step()
        found.append([p.detach().clone() for p in student.parameters()])
    return found


def same(a: list[list[Tensor]], b: list[list[Tensor]]) -> bool:
    pairs = [pair for x, y in zip(a, b, strict=True) for pair in zip(x, y, strict=True)]
    return all(torch.equal(x, y) for x, y in pairs)


def test_without_matching_it_is_scm() -> None:
    """Step by step, bit for bit; and with the first weight doubled, twice that loss."""
    expected = weights_behind(SCM)
    assert same(weights_behind(of_both(matching_weight=0.0)), expected)
    assert not same(weights_behind(of_both()), expected)
    student = PointMap(classes=2)
    twice, once = (
        loss(networks(student), batch(), Phase(0, 1), Generator().manual_seed(2)).total
        for loss in (of_both(2.0, matching_weight=0.0), SCM)
    )
    assert torch.equal(twice, 2 * once)


@pytest.mark.parametrize("form", [scm_tangent, rcm_tangent])
def test_its_own_tangent_is_scms_once_that_is_warm(form: TangentForm) -> None:
    """From update 4 on, r = 1; before, rCM's code pulls otherwise."""
    student, own = PointMap(classes=2), partial(LOSS, form=form)
    for update, equal in ((1, form is scm_tangent), (4, True), (9, True)):
        norms = [
            float(
                loss(networks(student), batch(), Phase(update, 10), Generator().manual_seed(2))
                .terms["tangent_norm"]
                .detach()
            )
            for loss in (partial(SCM, loss=own, warmup_steps=4), partial(SCM, warmup_steps=4))
        ]
        assert (norms[0] == pytest.approx(norms[1], rel=1e-5)) is equal


def test_without_consistency_it_is_dmd_of_the_same_samples() -> None:
    """Twice λ times DMD2's loss without a discriminator: its squares are not halved."""
    options = {"adversarial": None, "adversarial_times": log_normal, "adversarial_weight": 0.0}
    alone = partial(dmd2.student, **MATCHED, **options)
    assert same(weights_behind(of_both(0.0, 0.5)), weights_behind(alone))

    def doubled(*given: Any) -> LossTerms:
        return LossTerms(2 * alone(*given).total)

    assert same(weights_behind(of_both(0.0, 1.0)), weights_behind(doubled))


def test_both_terms_are_added() -> None:
    """In this order of draws: consistency's, then the rollout's and matching's."""
    student, update = PointMap(classes=2), Phase(2, 10)
    generator = Generator().manual_seed(2)
    parts = [
        loss(networks(student), batch(), update, generator).total
        for loss in (SCM, of_both(0.0, 0.01))
    ]
    whole = of_both(1.0, 0.01)(networks(student), batch(), update, Generator().manual_seed(2))
    torch.testing.assert_close(whole.total, parts[0] + parts[1])
    assert set(whole.terms) == {"tangent_norm", "nan_share", "matching"}
    torch.testing.assert_close(0.02 * whole.terms["matching"], parts[1].detach())


class Given(nn.Module):
    """A student of one step whose samples are its parameters: x_0 = -F at π/2."""

    def __init__(self, x_0: Tensor) -> None:
        super().__init__()
        self.x_0 = nn.Parameter(x_0.double())

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        assert (t == math.pi / 2).all()
        return -self.x_0


class Noted(nn.Module):
    """A network that keeps what it was asked for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        self.asked.append((x, t))
        return self.network(x, t, condition)


def test_the_gradient_of_a_sample_is_the_papers() -> None:
    """Of λ mean_D (x_0 - sg[x_0 - (f_f - f_T) / mean|x_0 - f_T|])², f_T guided: 2 stays."""
    given, fake = batch(), Noted(FAKE)
    student = Given(given.x_0 + 0.5)
    one = partial(backward_simulation, times=[math.pi / 2])
    loss = of_both(0.0, 0.3, rollout=one)
    double = ImageBatch(given.x_0.double(), given.condition)
    of = Networks(student, TEACHER, None, fake)
    loss(of, double, Phase(0, 1), Generator().manual_seed(3)).total.backward()
    ((x_t, t),) = fake.asked
    x_0, scale = student.x_0.detach(), torch.full((16,), 2.0).double()
    f_T = denoised(x_t, guided(TEACHER, x_t, t, given.condition, scale), t)
    f_f = denoised(x_t, FAKE(x_t, t, given.condition), t)
    norm = (x_0 - f_T).abs().mean(1, keepdim=True)
    expected = 0.3 * 2 * (f_f - f_T) / norm / 2 / 16
    torch.testing.assert_close(student.x_0.grad, expected, rtol=1e-9, atol=1e-12)


def test_no_distribution_is_matched_before_the_tangent_is_warm() -> None:
    """The fake score, which has not begun then, is not asked; from then on it is."""
    student, fake = PointMap(classes=2), Noted(FAKE)
    of, alone = Networks(student, TEACHER, None, fake), partial(SCM, warmup_steps=4)
    loss = of_both(consistency=alone, matching_from=4)
    for update in range(6):
        found = loss(of, batch(), Phase(update, 9), Generator().manual_seed(2))
        assert ("matching" in found.terms) is (update >= 4)
        assert len(fake.asked) == max(0, update - 3)
        if update < 4:
            expected = alone(of, batch(), Phase(update, 9), Generator().manual_seed(2))
            assert torch.equal(found.total, expected.total)


def test_the_critics_loss_is_the_error_of_its_denoiser_over_the_noise() -> None:
    """|x_0 - f_f|² / sin² t = |F_f - dx/dt|², at noised samples; data are not read."""
    fake, x_0 = Noted(FAKE), batch().x_0.double()
    unread = ImageBatch(torch.full_like(x_0, torch.nan), batch().condition)
    found = matching.critic(
        Networks(Given(x_0), TEACHER, None, fake),
        unread,
        Phase(0, 1),
        Generator().manual_seed(3),
        rollout=partial(backward_simulation, times=[math.pi / 2]),
        guidance_scale=fixed,
        times=log_normal,
        weighting=even,
    )
    ((x_t, t),) = fake.asked
    noise = (x_t - t.cos()[:, None] * x_0) / t.sin()[:, None]
    assert 0.6 < float(noise.std()) < 1.4
    torch.testing.assert_close(noised(x_0, noise, t), x_t)
    error = x_0 - denoised(x_t, FAKE(x_t, t, batch().condition), t)
    expected = (error.square().sum(1) / t.sin().square() / 2).mean()
    torch.testing.assert_close(found.total, expected)


def test_the_critic_teaches_the_fake_score_alone_on_rollouts_that_fall() -> None:
    """1, 2, 3 and again 1 steps of the student from pure noise."""
    torch.manual_seed(0)
    student, fake = Noted(PointMap(classes=2)), PointMap(classes=2)
    teacher = copy.deepcopy(fake)
    for turn in range(4):
        student.asked.clear()
        matching.critic(
            Networks(student, teacher, None, fake),
            batch(),
            Phase(0, 9, turn),
            Generator().manual_seed(turn),
            rollout=MATCHED["rollout"],
            guidance_scale=fixed,
            times=log_normal,
            weighting=even,
        ).total.backward()
        times = torch.stack([t for _, t in student.asked])
        assert len(times) == turn % 3 + 1
        assert (times[0] == math.pi / 2).all()
        assert (times.diff(dim=0) <= 0).all()
    assert all(p.grad is None for p in [*student.parameters(), *teacher.parameters()])
    assert all(p.grad is not None for p in fake.parameters())
