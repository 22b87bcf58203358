"""The derivative of a network along a direction, J = dF(x, t) along (ẋ, ṫ).

Three ways to it share a signature: `functional`, exact; `one_pass`, the same with the gradient of F
from one forward; and `central_difference`, of two more calls. J has no gradient, and all are
outside of autocast: the error of a 16-bit tangent is of the size of the tangent. None needs a
change to the network.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad

from stillhouse.diffusion.dual_operations import dual_operations
from stillhouse.diffusion.paths import along
from stillhouse.errors import UserError
from stillhouse.ranges import Positive

Velocity = Callable[[Tensor, Tensor], Tensor]
Tangent = Callable[[Velocity, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# What a central difference may differ by from a right tangent, relative: it is coarse where a
# network embeds 1000 t. A tangent that lost a part is wrong by more.
TOLERANCE = 0.1
STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4)


def functional(
    F: Velocity,
    x: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    x_dot: Float[Tensor, "B ..."],
    t_dot: Float[Tensor, "B"],
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
    """Return F(x, t) and J by forward-mode AD.

    Args:
        F: the network.
        x, t: where.
        x_dot, t_dot: along what.
    """
    with torch.no_grad():
        return _with_tangent(F, x, t, x_dot, t_dot)


def one_pass(
    F: Velocity,
    x: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    x_dot: Float[Tensor, "B ..."],
    t_dot: Float[Tensor, "B"],
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
    """Return F(x, t) with its gradient and J without, of one forward pass.

    It spares a step the pass for the gradient, and keeps every activation with its tangent: twice
    the memory. In float32, too.

    Args:
        F, x, t, x_dot, t_dot: as in `functional`.
    """
    F_x, J = _with_tangent(F, x, t, x_dot, t_dot)
    return F_x, J.detach()


def _with_tangent(
    F: Velocity, x: Tensor, t: Tensor, x_dot: Tensor, t_dot: Tensor
) -> tuple[Tensor, Tensor]:
    # Not `torch.func.jvp`: what FSDP2 does to weights in a call is refused inside of a transform.
    with _exact(x), dual_operations(), forward_ad.dual_level():
        both = F(forward_ad.make_dual(x, x_dot), forward_ad.make_dual(t, t_dot))
        F_x, J = forward_ad.unpack_dual(both)
    return F_x, torch.zeros_like(F_x) if J is None else J


def central_difference(
    F: Velocity,
    x: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    x_dot: Float[Tensor, "B ..."],
    t_dot: Float[Tensor, "B"],
    *,
    step: Positive = 1e-3,
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B ..."]]:
    """Return F(x, t) and J by a central difference, for networks without a forward-mode derivative.

    Its error is of the order of step² and of the network's rounding over step. With |ṫ| at most
    sin t cos t, as in consistency training, no time leaves [0, π/2] for a step up to 1.

    Args:
        F, x, t, x_dot, t_dot: as in `functional`.
        step: h of (F(x + h ẋ, t + h ṫ) - F(x - h ẋ, t - h ṫ)) / 2h.
    """
    with torch.no_grad(), _exact(x):
        ahead = F(x + step * x_dot, t + step * t_dot)
        behind = F(x - step * x_dot, t - step * t_dot)
        return F(x, t), (ahead - behind) / (2 * step)


def check_network(
    network: nn.Module,
    F: Velocity,
    x: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    *,
    key: str = "student",
) -> None:
    """Refuse a network whose forward-mode derivative is missing, incomplete or without time.

    Args:
        network: whose modules a refusal names.
        F: the network as a function of (x, t).
        x, t: where to try it; t inside of its range.
        key: of the network in the config.

    Raises:
        UserError: naming the module that has no derivative and the way out; or saying that the
            output does not depend on t; or that the derivative is not the one of a difference.
    """
    x_dot = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    x_dot = x_dot.to(x.device)
    still = torch.zeros_like(t)
    way_out = (
        "take the tangent of a difference instead, method.loss.tangent._target_="
        "stillhouse.diffusion.tangents.central_difference with "
        "stages.<stage>.family.takes_tangents=false"
    )
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            # What fails without a tangent too says so itself.
            F(x, t)
        with _innermost(network) as inside:
            try:
                _, of_time = functional(F, x, t, torch.zeros_like(x), torch.ones_like(t))
                _, of_x = functional(F, x, t, x_dot, still)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # NotImplementedError is one
                raise UserError(
                    f"{key}: its module {inside[-1] if inside else 'itself'} has no forward-mode "
                    f"derivative ({str(error).splitlines()[0]}); {way_out}"
                ) from error
        if not of_time.any():
            raise UserError(
                f"{key}: its output does not depend on t along a tangent; a time that is cast to "
                "an integer, or computed under no_grad, has none: pass it on as a float"
            )
        for name, along_it, directions in (
            ("x", of_x, (x_dot, still)),
            ("t", of_time, (torch.zeros_like(x), torch.ones_like(t))),
        ):
            off = min(
                _relative(central_difference(F, x, t, *directions, step=step)[1], along_it)
                for step in STEPS
            )
            if not off < TOLERANCE:
                raise UserError(
                    f"{key}: its forward-mode derivative along {name} is off by {off:.0%} from a "
                    f"difference: an operation in it drops the tangent; {way_out}"
                )
    finally:
        network.train(training)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


@contextmanager
def _exact(x: Tensor) -> Iterator[None]:
    with torch.autocast(x.device.type, enabled=False):
        yield


@contextmanager
def _innermost(network: nn.Module) -> Iterator[list[str]]:
    """Give a list of the modules that are being called, outermost first."""
    inside: list[str] = []

    def enter(name: str, module: nn.Module) -> Callable[..., None]:
        said = f"{name} ({type(module).__name__})"

        def hook(*_: object) -> None:
            inside.append(said)

        return hook

    def leave(*_: object) -> None:
        inside.pop()

    handles = [
        handle
        for name, module in network.named_modules()
        if name
        for handle in (
            module.register_forward_pre_hook(enter(name, module)),
            module.register_forward_hook(leave),
        )
    ]
    try:
        yield inside
    finally:
        for handle in handles:
            handle.remove()


def consistency_direction(
    velocity: Float[Tensor, "B ..."], t: Float[Tensor, "B"]
) -> tuple[Float[Tensor, "B ..."], Float[Tensor, "B"]]:
    """Return (ẋ, ṫ) = cos t sin t (dx/dt, 1): the factor of sCM's tangent goes into the directions.

    Near t = π/2 the derivative in t of a network may be large where cos t sin t is small: their
    product is computed, and never the large one (2410.11081, Sec. 4.1).
    """
    factor = t.cos() * t.sin()
    return along(factor, velocity) * velocity, factor
