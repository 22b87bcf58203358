"""Distribution matching: the surrogate loss, weightings, and the forms that are one gradient."""

from functools import partial

import pytest
import torch
from torch import Tensor

from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.trigflow import denoised
from stillhouse.objectives.distribution_matching import (
    Weighting,
    by_teacher_error,
    matching_gradient,
    of_variance,
    plain,
    surrogate_loss,
)
from stillhouse.records.diffusion import Condition

TEACHER = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], [0.3, 0.4])
FAKE = GaussianMixture([[0.2, 0.1]], [0.8])
WEIGHTINGS = [plain, of_variance, by_teacher_error]


def places() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return x_0, x_t, t and what both denoisers say of them."""
    generator = torch.Generator().manual_seed(0)
    x_0, x_t = torch.randn(2, 40, 2, generator=generator, dtype=torch.double)
    t = torch.linspace(0.05, 1.5, 40, dtype=torch.double)
    f_fake, f_teacher = (denoised(x_t, n(x_t, t, Condition()), t) for n in (FAKE, TEACHER))
    return x_0, x_t, t, f_fake, f_teacher


def noise_of(x_t: Tensor, f: Tensor, t: Tensor) -> Tensor:
    return (x_t - along(t.cos(), x_t) * f) / along(t.sin(), x_t)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_where_denoisers_agree_there_is_no_gradient(weighting: Weighting) -> None:
    """Exactly, for any sample; elsewhere there is one, away from the fake score's denoiser."""
    x_0, _, t, f_fake, f_teacher = places()
    assert (matching_gradient(x_0, f_teacher, f_teacher, t, weighting) == 0).all()
    g = matching_gradient(x_0, f_fake, f_teacher, t, weighting)
    assert (g * (f_fake - f_teacher) > 0).all()


def test_scores_noise_and_data_are_one_gradient() -> None:
    """(ε_T - ε_F) = cot t (f_F - f_T) = sin t (s_F - s_T), the scores from their own formula."""
    _, x_t, t, f_fake, f_teacher = places()
    cos, sin = along(t.cos(), x_t), along(t.sin(), x_t)
    noises = noise_of(x_t, f_teacher, t) - noise_of(x_t, f_fake, t)
    torch.testing.assert_close(noises, cos / sin * (f_fake - f_teacher))
    scores = FAKE.score(x_t, t, Condition()) - TEACHER.score(x_t, t, Condition())
    torch.testing.assert_close(noises, sin * scores)


def test_variance_weighs_noise() -> None:
    """SwiftBrush's sin² t (ε_T - ε_F): DMD2's without its normaliser, times cos t sin t."""
    x_0, x_t, t, f_fake, f_teacher = places()
    cos, sin = along(t.cos(), x_t), along(t.sin(), x_t)
    g = matching_gradient(x_0, f_fake, f_teacher, t, of_variance)
    noises = noise_of(x_t, f_teacher, t) - noise_of(x_t, f_fake, t)
    torch.testing.assert_close(g, sin.square() * noises)
    error = along((x_0 - f_teacher).abs().mean(1), x_t)
    dmd = matching_gradient(x_0, f_fake, f_teacher, t, by_teacher_error)
    torch.testing.assert_close(g, dmd * error * cos * sin)


def test_the_normaliser_is_a_samples_own() -> None:
    """Both errors larger, of each sample by another factor, leave g; the fake's alone does not."""
    x_0, _, t, f_fake, f_teacher = places()
    g = matching_gradient(x_0, f_fake, f_teacher, t, by_teacher_error)
    factors = torch.logspace(-1, 2, len(t), dtype=torch.double)[:, None]
    larger_fake, larger_teacher = (x_0 + factors * (f - x_0) for f in (f_fake, f_teacher))
    larger = matching_gradient(x_0, larger_fake, larger_teacher, t, by_teacher_error)
    torch.testing.assert_close(larger, g)
    alone = matching_gradient(x_0, larger_fake, f_teacher, t, by_teacher_error)
    assert (alone - g).abs().max() > 0.1
    rows = matching_gradient(x_0[:1], f_fake[:1], f_teacher[:1], t[:1], by_teacher_error)
    assert torch.equal(rows, g[:1])


def test_it_is_the_mean_over_a_samples_coordinates() -> None:
    x_0 = torch.zeros(1, 3, 2, 2, dtype=torch.double)
    f_teacher = torch.arange(-6.0, 6.0, dtype=torch.double).view(1, 3, 2, 2)
    weight = by_teacher_error(x_0, f_teacher, torch.ones(1, dtype=torch.double))
    assert weight.item() == pytest.approx(1 / 3)


def test_a_surrogate_has_the_given_gradient_whatever_its_value() -> None:
    """dL/dx_0 = g / D wherever x_0 lies and whatever the value |g|² / 2D is; none beyond x_0."""
    g = torch.randn(5, 3, 2, dtype=torch.double, requires_grad=True)
    for shift in (0.0, 100.0):
        x_0 = (torch.randn(5, 3, 2, dtype=torch.double) + shift).requires_grad_()
        loss = surrogate_loss(x_0, g)
        torch.testing.assert_close(loss, g.square().flatten(1).sum(1) / 12)
        gradient, none = torch.autograd.grad(loss.sum(), [x_0, g], allow_unused=True)
        torch.testing.assert_close(gradient, g.detach() / 6)
        assert none is None


def test_what_is_not_finite_does_not_pull() -> None:
    x_0, f = torch.zeros(4, 2), torch.ones(4, 2)
    f_fake = f.clone()
    f_fake[0, 0], f_fake[1, 1], f_fake[2, 0], f_fake[3] = torch.nan, torch.inf, -torch.inf, 2.0
    g = matching_gradient(x_0, f_fake, f, torch.ones(4), plain)
    assert g.tolist() == [[0, 0], [0, 0], [0, 0], [1, 1]]


def test_a_teacher_without_an_error_does_not_divide_by_it() -> None:
    x_0, t = torch.zeros(1, 2), torch.ones(1)
    assert by_teacher_error(x_0, x_0, t).item() == pytest.approx(1e5)
    at_most = partial(by_teacher_error, least=0.1)
    g = matching_gradient(x_0, x_0 + 0.2, x_0, t, at_most)
    torch.testing.assert_close(g, torch.full((1, 2), 2.0))
