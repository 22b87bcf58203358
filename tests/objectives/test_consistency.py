"""Continuous-time consistency against its closed form for a Gaussian, and its identities."""

import math

import pytest
import torch
from torch import Tensor

from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.tangents import consistency_direction, functional
from stillhouse.objectives.consistency import (
    TangentForm,
    by_noise,
    consistency_loss,
    even,
    finite_rows,
    normalised,
    rcm_tangent,
    scm_tangent,
)
from stillhouse.records.diffusion import Condition

MU, S = 0.6, 0.4
TEACHER = GaussianMixture([[MU, MU]], [S])


def exact(x: Tensor, t: Tensor) -> Tensor:
    """F*, whose consistency function is the end of the path."""
    f = TEACHER.consistency(x, t)
    return (along(t.cos(), x) * x - f) / along(t.sin(), x)


def teacher(x: Tensor, t: Tensor) -> Tensor:
    return TEACHER(x, t, Condition())


def places() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 2, generator=generator, dtype=torch.double)
    return x, torch.linspace(0.01, math.pi / 2 - 1e-3, 50, dtype=torch.double)


def tangent_at(network, x: Tensor, t: Tensor, r: float, form: TangentForm = scm_tangent) -> Tensor:
    F_T = teacher(x, t)
    F, J = functional(network, x, t, *consistency_direction(F_T, t))
    return form(F, F_T, x, J, t, r)


@pytest.mark.parametrize("form", [scm_tangent, rcm_tangent])
def test_the_exact_consistency_function_is_the_root(form: TangentForm) -> None:
    x, t = places()
    assert tangent_at(exact, x, t, 1.0, form).abs().max() < 1e-12
    assert tangent_at(teacher, x, t, 1.0, form).abs().max() > 0.1


def test_the_teacher_of_a_point_is_the_root_itself() -> None:
    """Without a spread denoiser and consistency function coincide, and g = 0 at the start."""
    x, t = places()
    for deviation, least, most in ((0.4, 0.1, 10.0), (1e-6, 0.0, 1e-5)):
        point = GaussianMixture([[MU, MU]], [deviation])

        def network(x: Tensor, t: Tensor, point=point) -> Tensor:
            return point(x, t, Condition())

        F, J = functional(network, x, t, *consistency_direction(network(x, t), t))
        assert least <= scm_tangent(F, F, x, J, t, 1.0).abs().max() < most


def test_standard_noise_as_data() -> None:
    """N(0, 1) at every time: F_T = 0, F* = -tan(t/2) x_t."""
    standard = GaussianMixture([[0.0, 0.0]], [1.0])
    x, t = places()
    assert standard(x, t, Condition()).abs().max() < 1e-15
    f = standard.consistency(x, t)
    F = (along(t.cos(), x) * x - f) / along(t.sin(), x)
    torch.testing.assert_close(F, -along(torch.tan(t / 2), x) * x)

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return -along(torch.tan(t / 2), x) * x

    zero = torch.zeros_like(x)
    F, J = functional(exact, x, t, *consistency_direction(zero, t))
    assert scm_tangent(F, zero, x, J, t, 1.0).abs().max() < 1e-15


def test_each_part_of_the_tangent_is_needed() -> None:
    """Without J, without x_t or without the teacher, the exact function is no root any more."""
    x, t = places()
    F_T = teacher(x, t)
    F, J = functional(exact, x, t, *consistency_direction(F_T, t))
    zero = torch.zeros_like(x)
    for parts in ((F, F_T, x, zero), (F, F_T, zero, J), (F, zero, x, J), (zero, F_T, x, J)):
        assert scm_tangent(*parts, t, 1.0).abs().max() > 0.01


def test_a_network_at_the_data_is_pulled_to_the_velocity() -> None:
    """t -> 0: g -> -(F - F_T); t = π/2: g = 0, consistency teaches nothing there."""
    x, _ = places()

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + along(t, x)

    near, end = (torch.full((50,), t, dtype=torch.double) for t in (1e-8, math.pi / 2))
    expected = -(network(x, near) - teacher(x, near))
    torch.testing.assert_close(tangent_at(network, x, near, 1.0), expected, atol=1e-6, rtol=1e-6)
    assert tangent_at(network, x, end, 1.0).abs().max() < 1e-12


def test_warm_up() -> None:
    """At r = 0 sCM's root is the teacher; both forms agree at r = 1 and not before."""
    x, t = places()
    assert tangent_at(teacher, x, t, 0.0).abs().max() == 0
    assert tangent_at(teacher, x, t, 0.0, rcm_tangent).abs().max() > 0.01

    def network(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x) + along(t, x)

    ours, theirs = (tangent_at(network, x, t, 1.0, form) for form in (scm_tangent, rcm_tangent))
    torch.testing.assert_close(ours, theirs)
    ours, theirs = (tangent_at(network, x, t, 0.5, form) for form in (scm_tangent, rcm_tangent))
    assert (ours - theirs).abs().max() > 0.01


def test_value_and_gradient() -> None:
    """The value is (|g| / (|g| + c))² / D whatever F is, the gradient -2 ĝ / D."""
    g = torch.randn(6, 3, 2, dtype=torch.double)
    F = torch.randn(6, 3, 2, dtype=torch.double, requires_grad=True)
    c = 0.2
    loss = consistency_loss(F, normalised(g, c), torch.ones(6), None)
    size = g.flatten(1).norm(dim=1)
    torch.testing.assert_close(loss, (size / (size + c)).square() / 6)
    (gradient,) = torch.autograd.grad(loss.sum(), F)
    torch.testing.assert_close(gradient, -2 * normalised(g, c) / 6)


def test_the_best_log_variance_is_the_log_of_the_loss() -> None:
    g = normalised(torch.randn(1, 8, dtype=torch.double), 0.2)
    F, weights = torch.zeros(1, 8, dtype=torch.double), torch.ones(1, dtype=torch.double)
    best = consistency_loss(F, g, weights, None).log().requires_grad_()
    (slope,) = torch.autograd.grad(consistency_loss(F, g, weights, best).sum(), best)
    assert slope.abs().max() < 1e-12
    unweighted = consistency_loss(F, g, weights, torch.zeros(1))
    torch.testing.assert_close(unweighted, consistency_loss(F, g, weights, None))


def test_weightings() -> None:
    t = torch.tensor([0.1, math.pi / 4, 1.5], dtype=torch.double)
    torch.testing.assert_close(by_noise(t), t.cos() / t.sin())
    assert (even(t) == 1).all()


def test_rows_with_nan_are_found() -> None:
    a, b = torch.zeros(4, 2, 2), torch.zeros(4, 3)
    a[1, 0, 1], b[2, 2] = torch.nan, torch.inf
    assert finite_rows(a, b).tolist() == [True, False, False, True]
