"""The fast paths as torch operators, opaque to torch.compile, with the gradients of the primal.

Each takes the name of the path that runs, `streaming` or `triton`, which is imported when it is
first needed. The tangent comes out attached to a node that raises: a loss that forgets to detach it
is told so, and not given half a gradient.
"""

from types import ModuleType
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

from stillhouse_kernels.attention_inputs import autocast_off
from stillhouse_kernels.modulated_norm import streaming

_OF_TANGENT = (
    "modulated_layer_norm: its tangent has no gradient in the fast paths; detach the tangent (the "
    "losses of sCM and MeanFlow stop the gradient there), or take backend='reference'"
)
_SECOND = (
    "modulated_layer_norm: the fast paths have no second derivative; backend='reference' has one"
)
_IN_DUAL_LEVEL = (
    "modulated_layer_norm: a backward pass under forward-mode AD would lose the gradient's "
    "tangent; call it behind the dual level, or take backend='reference'"
)


def path(backend: str) -> ModuleType:
    """Return the module that implements `streaming` or `triton`."""
    if backend == "triton":
        from stillhouse_kernels.modulated_norm import launch

        return launch
    return streaming


@torch.library.custom_op("stillhouse_kernels::modulated_norm_forward", mutates_args=())
def forward(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B, N, D], and mean and (var + eps)^-1/2 of x [B, N].

    Args:
        x: [B, N, D].
        shift, scale: [B, D].
        eps: added to the variance.
        backend: `streaming` or `triton`.
    """
    with autocast_off(x):
        return path(backend).forward(x, shift, scale, eps)


@forward.register_fake
def _(
    x: Tensor, shift: Tensor, scale: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), _empty_statistic(x), _empty_statistic(x)


@torch.library.custom_op("stillhouse_kernels::modulated_norm_jvp", mutates_args=())
def jvp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_t: Tensor | None,
    shift_t: Tensor | None,
    scale_t: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and its tangent, mean and (var + eps)^-1/2; tangents are shaped as their primals."""
    with autocast_off(x):
        return path(backend).jvp(x, shift, scale, x_t, shift_t, scale_t, eps)


@jvp.register_fake
def _(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_t: Tensor | None,
    shift_t: Tensor | None,
    scale_t: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y, y_t = (x.new_empty(x.shape) for _ in range(2))
    return y, y_t, _empty_statistic(x), _empty_statistic(x)


@torch.library.custom_op("stillhouse_kernels::modulated_norm_backward", mutates_args=())
def backward(
    x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [B, N, D], dshift and dscale [B, D], for grad_y [B, N, D]."""
    with autocast_off(x):
        return path(backend).backward(x, scale, mean, rstd, grad_y)


@backward.register_fake
def _(
    x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape), scale.new_empty(scale.shape)


def _empty_statistic(x: Tensor) -> Tensor:
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[:2], dtype=working)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, scale, *_, ctx.backend = inputs
    mean, rstd = output[-2:]
    ctx.save_for_backward(x, scale, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    # What nobody differentiates comes as None, and a gradient of the tangent is told from zeros.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return None, None, None
    if fwd._current_level >= 0:
        raise RuntimeError(_IN_DUAL_LEVEL)
    return backward(*ctx.saved_tensors, grad_y, ctx.backend)


def _forward_backward(ctx: Any, grad_y: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    return *_gradients(ctx, grad_y), None, None


def _jvp_backward(
    ctx: Any, grad_y: Tensor | None, grad_y_t: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    if grad_y_t is not None:
        raise RuntimeError(_OF_TANGENT)
    return *_gradients(ctx, grad_y), *(None,) * 5


def _refuse(*_: Any) -> None:
    raise RuntimeError(_SECOND)


forward.register_autograd(_forward_backward, setup_context=_save)
jvp.register_autograd(_jvp_backward, setup_context=_save)
backward.register_autograd(_refuse)
