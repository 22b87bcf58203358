"""Paths, what networks on them predict, and one seen as another."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from stillhouse.diffusion import paths
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import RECTIFIED_FLOW, TRIGFLOW, Path, along
from stillhouse.diffusion.trigflow import TrigFlowView, denoised, noised
from stillhouse.errors import UserError
from stillhouse.records.diffusion import Condition


def stable_diffusion() -> Tensor:
    """Return ᾱ of its 1,000 levels, by diffusers."""
    scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    return scheduler.alphas_cumprod


PATHS = {
    "trigflow": TRIGFLOW,
    "rectified flow": RECTIFIED_FLOW,
    "variance preserving": paths.variance_preserving(),
    "variance exploding": paths.variance_exploding(),
    "numbered": paths.numbered(stable_diffusion()),
}
PREDICTIONS = [paths.sample, paths.epsilon, paths.v, paths.flow, paths.edm]


def inner_times(path: Path, count: int = 7) -> Tensor:
    return torch.linspace(0.05, 0.95, count, dtype=torch.double) * min(path.last, 3.0)


def pair(shape: tuple[int, ...] = (7, 3)) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, *shape, generator=generator, dtype=torch.double)
    return x_0, noise


@pytest.mark.parametrize("name", PATHS)
def test_derivatives_and_inverses(name: str) -> None:
    path = PATHS[name]
    t, ones = inner_times(path), torch.ones(7, dtype=torch.double)
    for of, dot in ((path.alpha, path.alpha_dot), (path.sigma, path.sigma_dot)):
        torch.testing.assert_close(torch.func.jvp(of, (t,), (ones,))[1], dot(t))
    torch.testing.assert_close(path.time_of_angle(path.angle(t)), t)
    assert (path.angle(t).diff() > 0).all()


@pytest.mark.parametrize("name", PATHS)
def test_outputs_become_each_other(name: str) -> None:
    path, t, (x_0, noise) = PATHS[name], inner_times(PATHS[name]), pair()
    x_t = paths.add_noise(path, x_0, noise, t)
    outputs = {}
    for prediction in PREDICTIONS:
        a, b = (along(c, x_0) for c in prediction(path, t))
        outputs[prediction] = a * x_0 + b * noise
    for given, output in outputs.items():
        found = paths.ends(path, given, x_t, output, t)
        torch.testing.assert_close(found, (x_0, noise))
        for wanted, expected in outputs.items():
            said = paths.convert(path, x_t, output, t, given=given, wanted=wanted)
            torch.testing.assert_close(said, expected)


def test_flow_is_the_velocity_at_fixed_ends() -> None:
    x_0, noise = pair()
    for path in PATHS.values():
        t = inner_times(path)
        velocity = torch.func.jvp(
            lambda t, path=path: paths.add_noise(path, x_0, noise, t), (t,), (torch.ones_like(t),)
        )[1]
        a, b = (along(c, x_0) for c in paths.flow(path, t))
        torch.testing.assert_close(a * x_0 + b * noise, velocity)


def test_numbered_levels_are_the_schedulers() -> None:
    known = stable_diffusion().double()
    path, t = PATHS["numbered"], torch.arange(1000, dtype=torch.double)
    assert path.last == 999
    torch.testing.assert_close(path.alpha(t).square(), known)
    torch.testing.assert_close(path.sigma(t).square(), 1 - known)
    torch.testing.assert_close(path.time_of_angle(path.angle(t)), t)
    # One step before the first are clean data.
    clean = torch.zeros(1, dtype=torch.double)
    assert path.time_of_angle(clean) == -1
    assert path.alpha(clean - 1) == 1


@pytest.mark.parametrize("levels", [[0.9, 0.5, 0.0], [0.9, 0.95], [1.0, 0.5]])
def test_levels_that_do_not_fall_are_refused(levels: list[float]) -> None:
    with pytest.raises(UserError, match="expected falling numbers between 0 and 1"):
        paths.numbered(torch.tensor(levels))


def test_edm_is_its_preconditioning() -> None:
    """D = c_skip x + c_out F at σ_d = 1, of the paper's table 1."""
    path, t, (x_0, noise) = (
        PATHS["variance exploding"],
        torch.tensor([0.3, 2.0, 40.0]),
        pair((3, 4)),
    )
    t = t.double()
    x_t = paths.add_noise(path, x_0, noise, t)
    a, b = (along(c, x_0) for c in paths.edm(path, t))
    c_skip, c_out = 1 / (1 + t**2), t / (1 + t**2).sqrt()
    said = along(c_skip, x_t) * x_t + along(c_out, x_t) * (a * x_0 + b * noise)
    torch.testing.assert_close(said, x_0)


class Knows(nn.Module):
    """A network that knows both ends, and predicts from them what it is made to."""

    def __init__(self, path: Path, prediction: paths.Prediction) -> None:
        super().__init__()
        self.path, self.prediction = path, prediction
        self.x_0, self.noise = pair()
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor, condition: Condition, guidance_scale=None) -> Tensor:
        self.asked.append((x, t))
        a, b = (along(c, x) for c in self.prediction(self.path, t))
        return a * self.x_0 + b * self.noise


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PATHS)
def test_any_network_looks_like_a_trigflow_network(name: str, prediction) -> None:
    network = Knows(PATHS[name], prediction)
    t = torch.linspace(0.1, 1.45, 7, dtype=torch.double)
    x_t = noised(network.x_0, network.noise, t)
    F = TrigFlowView(network, network.path, prediction)(x_t, t, Condition())
    expected = along(t.cos(), x_t) * network.noise - along(t.sin(), x_t) * network.x_0
    torch.testing.assert_close(F, expected)
    torch.testing.assert_close(denoised(x_t, F, t), network.x_0)
    x_s, s = network.asked[0]
    torch.testing.assert_close(x_s, paths.add_noise(network.path, network.x_0, network.noise, s))


def test_the_closed_form_for_a_flow() -> None:
    """SANA-Sprint's wrapper at π/4 and at the ends: F = v / √2, x_s + v, v - x_s."""
    network = Knows(RECTIFIED_FLOW, paths.flow)
    velocity = network.noise - network.x_0
    ends = ((math.pi / 4, 0.0, 2**-0.5), (0.0, 1.0, 1.0), (math.pi / 2, -1.0, 1.0))
    for angle, x_weight, v_weight in ends:
        t = torch.full((7,), angle, dtype=torch.double)
        x_t = noised(network.x_0, network.noise, t)
        F = TrigFlowView(network, RECTIFIED_FLOW, paths.flow)(x_t, t, Condition())
        x_s = network.asked[-1][0]
        torch.testing.assert_close(F, x_weight * x_s + v_weight * velocity)


class Nonlinear(nn.Module):
    """A network that knows nothing."""

    def forward(self, x: Tensor, t: Tensor, *_) -> Tensor:
        return torch.tanh(x * along(1 + t, x)) + along(t.square(), x)


def test_the_denoiser_of_any_flow_is_that_of_its_view() -> None:
    """f + s v(x_s, s) = x_s whatever v says."""
    x_t, t = pair()[0], torch.linspace(0.0, math.pi / 2, 7, dtype=torch.double)
    F = TrigFlowView(Nonlinear(), RECTIFIED_FLOW, paths.flow)(x_t, t, Condition())
    s = t.sin() / (t.sin() + t.cos())
    x_s = x_t / along(t.sin() + t.cos(), x_t)
    said = denoised(x_t, F, t) + along(s, x_t) * Nonlinear()(x_s, s)
    torch.testing.assert_close(said, x_s, rtol=0, atol=1e-14)


def test_the_wrapper_is_part_of_the_tangent() -> None:
    """Of the wrapped network with a nonlinear inside: its jvp is its central difference."""
    view = TrigFlowView(Nonlinear(), RECTIFIED_FLOW, paths.flow)
    x, x_dot = pair()
    t, t_dot = torch.linspace(0.1, 1.4, 7, dtype=torch.double), torch.linspace(-1, 1, 7).double()

    def wrapped(x: Tensor, t: Tensor) -> Tensor:
        return view(x, t, Condition())

    J = torch.func.jvp(wrapped, (x, t), (x_dot, t_dot))[1]
    h = 1e-5
    difference = (wrapped(x + h * x_dot, t + h * t_dot) - wrapped(x - h * x_dot, t - h * t_dot)) / (
        2 * h
    )
    torch.testing.assert_close(J, difference, rtol=1e-6, atol=1e-8)


def test_a_path_with_an_end_is_asked_for_nothing_behind_it() -> None:
    path = paths.variance_exploding(sigma_max=80.0)
    network = Knows(path, paths.epsilon)
    TrigFlowView(network, path, paths.epsilon)(
        pair()[0], torch.full((7,), math.pi / 2), Condition()
    )
    assert (network.asked[0][1] == 80.0).all()


def test_dropped_conditions() -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    condition = Condition(torch.tensor([4, 5]), torch.randn(2, 3, 8), mask)
    dropped = condition.dropped(torch.tensor([True, False]))
    assert dropped.labels is not None
    assert dropped.labels.tolist() == [-1, 5]
    assert dropped.mask is not None
    assert dropped.mask.any(1).tolist() == [False, True]
    none = condition.none()
    assert none.labels is not None
    assert none.labels.tolist() == [-1, -1]
    assert none.mask is not None
    assert not none.mask.any()
    both = condition.joined(none)
    assert both.labels is not None
    assert both.labels.tolist() == [4, 5, -1, -1]
    twice = condition.repeated(2)
    assert twice.labels is not None
    assert twice.labels.tolist() == [4, 5, 4, 5]
    assert Condition().none() == Condition()


def test_the_oracle_is_what_it_says() -> None:
    """Its score is the gradient of its density, F follows from the score, f* solves dx/dt = F."""
    mixture = GaussianMixture([[1.0, 0.0], [-1.0, 0.5], [0.0, -1.0]], [0.3, 0.5, 0.2], [1, 2, 1])
    x = pair((7, 2))[0].requires_grad_()
    t = torch.linspace(0.2, 1.4, 7, dtype=torch.double)
    variances = mixture.deviations.square() * t.cos().square()[:, None] + t.sin().square()[:, None]
    offsets = x[:, None] - mixture.means * t.cos()[:, None, None]
    density = (-offsets.square().sum(2) / (2 * variances)).exp() / variances * mixture.weights
    (score,) = torch.autograd.grad(density.sum(1).log().sum(), x)
    torch.testing.assert_close(mixture.score(x, t, Condition()), score)
    F = mixture(x, t, Condition())
    # ε = -sin t · score, x_0 = (x - sin t ε) / cos t, F = cos t ε - sin t x_0.
    noise = -along(t.sin(), x) * score
    x_0 = (x - along(t.sin(), x) * noise) / along(t.cos(), x)
    torch.testing.assert_close(F, along(t.cos(), x) * noise - along(t.sin(), x) * x_0)
    torch.testing.assert_close(denoised(x, F, t), x_0)


def test_a_class_is_the_mixture_of_its_components() -> None:
    means, deviations, weights = [[1.0], [-1.0], [0.2]], [0.3, 0.5, 0.2], [1.0, 2.0, 1.0]
    whole = GaussianMixture(means, deviations, weights, labels=[0, 1, 0])
    part = GaussianMixture([means[0], means[2]], [0.3, 0.2], [1.0, 1.0])
    x, t = pair((7, 1))[0], torch.linspace(0.2, 1.4, 7, dtype=torch.double)
    of_class = whole(x, t, Condition(labels=torch.zeros(7, dtype=torch.long)))
    torch.testing.assert_close(of_class, part(x, t, Condition()))
    torch.testing.assert_close(
        whole(x, t, Condition(labels=torch.full((7,), -1))), whole(x, t, Condition())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"means": [[0.0]], "deviations": [0.0]},
            "deviations=[0.0], weights=[1.0]: expected",
        ),
        ({"means": [[0.0], [1.0, 2.0]], "deviations": [1, 1]}, "expected one of each"),
        (
            {"means": [[0.0]], "deviations": [1.0], "weights": [1, 2]},
            "expected one of each",
        ),
    ],
)
def test_mixtures_that_are_none(arguments, message: str) -> None:
    with pytest.raises(UserError) as refusal:
        GaussianMixture(**arguments)
    assert message in str(refusal.value)


def test_paths_that_are_none() -> None:
    with pytest.raises(UserError, match="beta_min=2, beta_max=1: expected 0 < beta_min"):
        paths.variance_preserving(2, 1)
    with pytest.raises(UserError, match="sigma_max=0: expected a number above 0"):
        paths.variance_exploding(0)
