"""The fast paths as torch operators, opaque to torch.compile, with the gradients of the primal.

Each takes the name of the path that runs, `streaming` or `triton`, which is imported when it is
first needed. The tangent comes out attached to a node that raises.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from stillhouse_kernels.attention_inputs import autocast_off
from stillhouse_kernels.linear_attention import streaming
from stillhouse_kernels.primal_gradients import register_gradients


def path(backend: str) -> ModuleType:
    """Return the module that implements `streaming` or `triton`."""
    if backend == "triton":
        from stillhouse_kernels.linear_attention import launch

        return launch
    return streaming


@torch.library.custom_op("stillhouse_kernels::relu_linear_attention_forward", mutates_args=())
def forward(q: Tensor, k: Tensor, v: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """Return O [B, h, N, e] and the sums over the keys, [V 1]ᵀ K [B, g, e + 1, d].

    Args:
        q: [B, h, N, d].
        k: [B, g, M, d].
        v: [B, g, M, e].
        eps: added to the denominator.
        backend: `streaming` or `triton`.
    """
    with autocast_off(q):
        return path(backend).forward(q, k, v, eps)


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return _empty_out(q, v), _empty_sums(k, v)


@torch.library.custom_op("stillhouse_kernels::relu_linear_attention_jvp", mutates_args=())
def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return O, its tangent and the sums; arguments as in `forward`, tangents as their primals."""
    with autocast_off(q):
        return path(backend).jvp(q, k, v, q_t, k_t, v_t, eps)


@jvp.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_t: Tensor | None,
    k_t: Tensor | None,
    v_t: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_out(q, v), _empty_out(q, v), _empty_sums(k, v)


@torch.library.custom_op("stillhouse_kernels::relu_linear_attention_backward", mutates_args=())
def backward(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, grad_out: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv of the primal, for its sums and grad_out [B, h, N, e]."""
    with autocast_off(q):
        return path(backend).backward(q, k, v, sums, grad_out, eps)


@backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, sums: Tensor, grad_out: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _empty_out(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _empty_sums(k: Tensor, v: Tensor) -> Tensor:
    working = torch.float64 if k.dtype == torch.float64 else torch.float32
    return k.new_empty(*k.shape[:2], v.shape[3] + 1, k.shape[3], dtype=working)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *_, eps, backend = inputs
    sums = output[-1]
    ctx.save_for_backward(q, k, v, sums)
    ctx.settings = (eps, backend)
    ctx.mark_non_differentiable(sums)


def _gradients(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return backward(*ctx.saved_tensors, grad_out, *ctx.settings)


register_gradients(
    "relu_linear_attention", forward, jvp, backward, save=_save, gradients=_gradients, settings=2
)
