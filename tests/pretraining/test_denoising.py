"""Flow matching and EDM's denoising: the papers' losses of the raw network, and their minimum."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from commands import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from stillhouse.diffusion import paths
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.diffusion.paths import RECTIFIED_FLOW, along
from stillhouse.diffusion.trigflow import TrigFlowView
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.records.diffusion import UNCONDITIONAL, Condition, ImageBatch


def method(name: str, **changes: Any) -> Callable[..., Any]:
    """Return a method as its YAML has it."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        node = compose(f"method/{name}").method
    return instantiate(OmegaConf.merge(node, changes))


def loss_of(name: str, student: Any, batch: ImageBatch, seed: int = 0, **changes: Any) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    networks = Networks(student, None, None)
    return method(name, **changes)(networks, batch, Phase(0, 1), generator).total


class Raw(nn.Module):
    """Some function of (x, s) that keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, x: Tensor, s: Tensor, condition: Condition, scale=None) -> Tensor:
        output = torch.tanh(x) * along(1 + s.clamp_max(3), x) + along(s.cos(), x)
        self.asked.append((x, s, output))
        return output


def drawn(count: int, shape: tuple[int, ...] = (2, 3, 3)) -> ImageBatch:
    x_0 = torch.randn(count, *shape, generator=torch.Generator().manual_seed(7)).double()
    return ImageBatch(x_0, Condition(labels=torch.arange(count)))


def test_flow_matching_is_the_squared_error_of_the_velocity() -> None:
    """mean |v(x_s, s) - (ε - x_0)|² with x_s = (1 - s) x_0 + s ε, s uniform: 2210.02747, eq. 23."""
    batch, raw = drawn(500), Raw()
    loss = loss_of("flow_matching", TrigFlowView(raw, RECTIFIED_FLOW, paths.flow), batch)
    ((x_s, s, v),) = raw.asked
    noise = (x_s - along(1 - s, x_s) * batch.x_0) / along(s, x_s)
    torch.testing.assert_close(loss, (v - (noise - batch.x_0)).square().mean())
    assert noise.std() == pytest.approx(1, abs=0.02)
    evenly = (torch.arange(500) + 0.5) / 500
    assert (s.sort().values - evenly).abs().max() < 0.08


def test_edm_is_the_weighted_squared_error_of_the_denoiser() -> None:
    """λ(σ) |D(y + n; σ) - y|², with the columns of table 1 of 2206.00364 at σ_d = 0.5."""
    sigma_d, mean, deviation = 0.5, -1.2, 1.2
    batch, raw = drawn(500), Raw()
    path = paths.variance_exploding(1e9)
    loss = loss_of("edm", TrigFlowView(raw, path, paths.edm), batch)
    ((x_s, s, output),) = raw.asked
    y, x, sigma = sigma_d * batch.x_0, sigma_d * x_s, sigma_d * s
    c_skip = sigma_d**2 / (sigma**2 + sigma_d**2)
    c_out = sigma * sigma_d / (sigma**2 + sigma_d**2).sqrt()
    D = along(c_skip, x) * x + along(c_out, x) * output
    weights = (sigma**2 + sigma_d**2) / (sigma * sigma_d) ** 2
    expected = (along(weights, x) * (D - y).square()).mean()
    torch.testing.assert_close(loss, expected)
    noise = (x - y) / along(sigma, x)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert sigma.log().mean() == pytest.approx(mean, abs=0.15)
    assert sigma.log().std() == pytest.approx(deviation, abs=0.12)


class Scaled(nn.Module):
    """The exact answer times one factor, plus another: at (1, 0) the minimum."""

    def __init__(self, mixture: GaussianMixture) -> None:
        super().__init__()
        self.mixture = mixture
        self.factors = nn.Parameter(torch.tensor([1.0, 0.0], dtype=torch.double))

    def forward(self, x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        return self.factors[0] * self.mixture(x, t, condition) + self.factors[1]


@pytest.mark.parametrize("name", ["flow_matching", "edm"])
def test_the_exact_velocity_is_the_minimum(name: str) -> None:
    """The gradient there is noise around 0, and a step away from it the loss is greater."""
    mixture = GaussianMixture([[0.8], [-0.5]], [0.3, 0.6]).requires_grad_(False)
    x_0, components = mixture.sample(40_000, torch.Generator().manual_seed(7))
    batch = ImageBatch(x_0.double(), Condition(labels=mixture.labels[components]))
    student = Scaled(mixture)
    loss = loss_of(name, student, batch)
    (gradient,) = torch.autograd.grad(loss, student.factors)
    # The loss is curved by about 2 in both; its minimum is found to within so much.
    assert gradient.abs().max() < 0.04
    for place, step in ((0, 0.2), (0, -0.2), (1, 0.2), (1, -0.2)):
        with torch.no_grad():
            student.factors[place] += step
            assert loss_of(name, student, batch) > loss + 0.01
            student.factors[place] -= step


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_so_many_conditions_are_dropped(share: float) -> None:
    seen: list[Tensor] = []

    def student(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        assert condition.labels is not None
        seen.append(condition.labels)
        return torch.zeros_like(x)

    batch = drawn(4000, (1,))
    loss_of("flow_matching", student, batch, condition_dropout=share)
    none = seen[0] == UNCONDITIONAL
    assert float(none.double().mean()) == pytest.approx(share, abs=0.02)
    assert torch.equal(seen[0][~none], torch.arange(4000)[~none])


def test_draws_are_the_generators() -> None:
    def student(x: Tensor, t: Tensor, condition: Condition, scale=None) -> Tensor:
        return x * along(t, x)

    batch = drawn(8)
    torch.manual_seed(0)
    first = loss_of("flow_matching", student, batch, seed=3)
    torch.manual_seed(1)
    assert loss_of("flow_matching", student, batch, seed=3) == first
    assert loss_of("flow_matching", student, batch, seed=4) != first
    assert math.isfinite(first)
