"""The tangent engine, and networks that it refuses."""

import re
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from stillhouse.diffusion import tangents
from stillhouse.diffusion.paths import along
from stillhouse.diffusion.tangents import (
    central_difference,
    check_network,
    consistency_direction,
    functional,
)
from stillhouse.errors import UserError


class Network(nn.Module):
    """Two layers around an operation, told the time by its sine."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(5, 8)
        self.inside = inside
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.sin()[:, None].to(x.dtype)
        return self.last(self.inside(self.first(torch.cat([x, time], 1))))


def point() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    x, x_dot = torch.randn(2, 6, 4)
    t, t_dot = torch.linspace(0.2, 1.3, 6).double(), torch.linspace(-1, 1, 6).double()
    return x, t, x_dot, t_dot


def test_both_ways_agree_in_float64() -> None:
    network = Network(nn.Tanh()).double()
    x, t, x_dot, t_dot = point()
    where = (x.double(), t, x_dot.double(), t_dot)
    exact = functional(network, *where)
    torch.testing.assert_close(
        central_difference(network, *where, step=1e-5), exact, rtol=1e-7, atol=1e-9
    )
    assert not exact[1].requires_grad


def test_autocast_does_not_reach_into_it() -> None:
    """A bf16 tangent would be off by its own size; both ways are those without autocast."""
    network, where = Network(nn.Tanh()), point()
    for way in (functional, partial(central_difference, step=1e-2)):
        plain = way(network, *where)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert network(*where[:2]).dtype == torch.bfloat16
            within = way(network, *where)
        torch.testing.assert_close(within, plain, rtol=0, atol=0)


def test_the_factor_goes_into_the_directions() -> None:
    network = Network(nn.Tanh()).double()
    x, t, velocity, _ = point()
    x, velocity = x.double(), velocity.double()
    _, J = functional(network, x, t, *consistency_direction(velocity, t))
    _, whole = functional(network, x, t, velocity, torch.ones_like(t))
    torch.testing.assert_close(J, along(t.cos() * t.sin(), whole) * whole)


def test_a_network_that_is_safe_is_not_refused_and_not_changed() -> None:
    network = Network(nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())).train()
    x, t, *_ = point()
    check_network(network, network, x, t)
    assert network.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


class Undifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads: Tensor) -> Tensor:
        return grads[0] * 2


class Lacks(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Undifferentiable.apply(x)


WAY_OUT = (
    "take the tangent of a difference instead, method.loss.tangent._target_="
    "stillhouse.diffusion.tangents.central_difference with "
    "stages.<stage>.family.takes_tangents=false"
)


def test_a_module_without_a_forward_derivative_is_named() -> None:
    network = Network(nn.Sequential(nn.SiLU(), Lacks()))
    x, t, *_ = point()
    with pytest.raises(UserError) as refusal:
        check_network(network, network, x, t)
    said = str(refusal.value)
    assert re.fullmatch(
        r"student: its module inside\.1 \(Lacks\) has no forward-mode derivative \(.+\); "
        + re.escape(WAY_OUT),
        said,
    )


def test_what_fails_without_a_tangent_is_not_called_one(monkeypatch) -> None:
    """Neither a network that fails at any call, nor memory that a tangent does not fit into."""
    network = Network(nn.Linear(3, 3))
    x, t, *_ = point()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        check_network(network, network, x, t)

    def too_large(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tangents, "functional", too_large)
    with pytest.raises(torch.OutOfMemoryError):
        check_network(Network(nn.Identity()), Network(nn.Identity()), x, t)


def test_the_way_out_is_one() -> None:
    network = Network(Lacks())
    network.double()
    x, t, x_dot, t_dot = point()
    x, x_dot = x.double(), x_dot.double()
    _, J = central_difference(network, x, t, x_dot, t_dot, step=1e-4)
    plain = Network(nn.Identity()).double()

    def doubled(x: Tensor, t: Tensor) -> Tensor:
        return plain.last(2 * plain.first(torch.cat([x, t.sin()[:, None]], 1)))

    expected = functional(doubled, x, t, x_dot, t_dot)[1]
    torch.testing.assert_close(J, expected, rtol=1e-6, atol=1e-8)


def test_a_time_that_is_cast_to_an_integer_is_found() -> None:
    network = Network(nn.SiLU())
    x, t, *_ = point()
    with pytest.raises(UserError) as refusal:
        check_network(network, lambda x, t: network(x, (1000 * t).long().double()), x, t)
    assert str(refusal.value) == (
        "student: its output does not depend on t along a tangent; a time that is cast to an "
        "integer, or computed under no_grad, has none: pass it on as a float"
    )


def test_a_tangent_that_is_dropped_on_the_way_is_found() -> None:
    class Drops(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach() + 0.1 * x

    network = Network(Drops())
    x, t, *_ = point()
    with pytest.raises(UserError) as refusal:
        check_network(network, network, x, t, key="stages.distil.student")
    assert re.fullmatch(
        r"stages\.distil\.student: its forward-mode derivative along x is off by \d+% from a "
        r"difference: an operation in it drops the tangent; " + re.escape(WAY_OUT),
        str(refusal.value),
    )
