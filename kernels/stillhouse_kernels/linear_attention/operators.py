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
from stillhouse_kernels.linear_attention import streaming

_OF_TANGENT = (
    "relu_linear_attention: its tangent has no gradient in the fast paths; detach the tangent (the "
    "losses of sCM and MeanFlow stop the gradient there), or take backend='reference'"
)
_SECOND = (
    "relu_linear_attention: the fast paths have no second derivative; backend='reference' has one"
)
_IN_DUAL_LEVEL = (
    "relu_linear_attention: a backward pass under forward-mode AD would lose the gradient's "
    "tangent; call it behind the dual level, or take backend='reference'"
)


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
    # What nobody differentiates comes as None, and a gradient of the tangent is told from zeros.
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return None, None, None
    if fwd._current_level >= 0:
        raise RuntimeError(_IN_DUAL_LEVEL)
    return backward(*ctx.saved_tensors, grad_out, *ctx.settings)


def _forward_backward(ctx: Any, grad_out: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    return *_gradients(ctx, grad_out), None, None


def _jvp_backward(
    ctx: Any, grad_out: Tensor | None, grad_out_t: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    if grad_out_t is not None:
        raise RuntimeError(_OF_TANGENT)
    return *_gradients(ctx, grad_out), *(None,) * 5


def _refuse(*_: Any) -> None:
    raise RuntimeError(_SECOND)


forward.register_autograd(_forward_backward, setup_context=_save)
jvp.register_autograd(_jvp_backward, setup_context=_save)
backward.register_autograd(_refuse)
