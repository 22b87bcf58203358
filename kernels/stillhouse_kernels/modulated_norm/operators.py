"""The fast paths as torch operators, opaque to torch.compile, with the gradients of the primal.

Each takes the name of the path that runs, `streaming` or `triton`, which is imported when it is
first needed. The tangent comes out attached to a node that raises.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stillhouse_kernels.attention_inputs import autocast_off
from stillhouse_kernels.modulated_norm import streaming
from stillhouse_kernels.primal_gradients import register_gradients


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


def _gradients(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return backward(*ctx.saved_tensors, grad_y, ctx.backend)


register_gradients(
    "modulated_layer_norm", forward, jvp, backward, save=_save, gradients=_gradients, settings=2
)
