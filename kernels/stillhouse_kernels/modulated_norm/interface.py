"""The two functions: a norm that forward-mode AD goes through, and its derivative by hand."""

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor

from stillhouse_kernels import forward_mode
from stillhouse_kernels.attention_inputs import autocast_off
from stillhouse_kernels.modulated_norm import arguments, operators, reference


def modulated_layer_norm(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """Return (1 + scale) ∘ (x - mean) / √(var + eps) + shift [B, N, D]; its tangent too under AD.

    Mean and variance (biased) are over the last axis, as in `layer_norm` without weights of its
    own. Gradients flow to x, shift and scale; a gradient of the tangent raises, as does a
    derivative of another derivative. Under autocast all three are cast to float32, as
    `layer_norm`'s inputs are on CUDA, and so is the result.

    Args:
        x: [B, N, D]; float64, float32, float16 or bfloat16, in which the result is.
        shift: [B, D] or [B, 1, D].
        scale: [B, D] or [B, 1, D].
        eps: added to the variance; 0 or more.
        backend: `auto`, `reference`, `streaming` or `triton`.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, a negative eps, a backend that is
            unknown or cannot run here.
        NotImplementedError: for a forward-mode derivative of another derivative.
    """
    x, shift, scale = (arguments.autocast(t) for t in (x, shift, scale))
    arguments.check("modulated_layer_norm", x, shift, scale, eps)
    chosen = arguments.backend_for(backend, x)
    shift, scale = arguments.of_elements(shift), arguments.of_elements(scale)
    if chosen == "reference":
        with autocast_off(x):
            return reference.modulated_layer_norm(x, shift, scale, eps)
    primals, tangents = forward_mode.unpack("modulated_layer_norm", (x, shift, scale))
    if all(t is None for t in tangents):
        return operators.forward(*primals, eps, chosen)[0]
    y, y_t, *_ = operators.jvp(*primals, *tangents, eps, chosen)
    return fwd.make_dual(y, y_t)


def modulated_layer_norm_jvp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_t: Tensor | None = None,
    shift_t: Tensor | None = None,
    scale_t: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return what `modulated_layer_norm` does, and its tangent [B, N, D].

    Args:
        x, shift, scale, eps, backend: as in `modulated_layer_norm`.
        x_t, shift_t, scale_t: tangents of x, shift and scale, of their shapes, dtypes and devices
            and of any layout; None is 0, and is not read.

    Raises:
        ValueError: as `modulated_layer_norm`, and for a tangent that does not fit its primal.
        NotImplementedError: for inputs that carry tangents of their own.
    """
    function = "modulated_layer_norm_jvp"
    x, shift, scale = primals = tuple(arguments.autocast(t) for t in (x, shift, scale))
    tangents = tuple(None if t is None else arguments.autocast(t) for t in (x_t, shift_t, scale_t))
    arguments.check(function, x, shift, scale, eps)
    forward_mode.check_tangents(function, {"x": x, "shift": shift, "scale": scale}, tangents)
    chosen = arguments.backend_for(backend, x)
    if chosen != "reference":
        forward_mode.refuse_tangents(function, *primals, *tangents)
    shift, scale = arguments.of_elements(shift), arguments.of_elements(scale)
    x_t, *vectors = tangents
    shift_t, scale_t = (None if t is None else arguments.of_elements(t) for t in vectors)
    if chosen == "reference":
        with autocast_off(x):
            return reference.jvp(x, shift, scale, x_t, shift_t, scale_t, eps)
    if x_t is None and shift_t is None and scale_t is None:
        y = operators.forward(x, shift, scale, eps, chosen)[0]
        return y, torch.zeros_like(y)
    return operators.jvp(x, shift, scale, x_t, shift_t, scale_t, eps, chosen)[:2]
