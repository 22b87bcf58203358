"""The modulated norm and its directional derivative as they are defined.

The specification of the fast paths: plain differentiable torch, derivatives of any order, float64
where the inputs are. 16-bit inputs are computed in float32.
"""

import torch
from torch import Tensor


def modulated_layer_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return y = (1 + scale) ∘ x̂ + shift [B, N, D], x̂ = (x - mean(x)) (var(x) + eps)^-1/2.

    Args:
        x: [B, N, D].
        shift, scale: [B, D].
        eps: added to the variance.
    """
    x_hat, _ = _normalised(x, eps)
    return _modulated(x_hat, shift, scale).to(x.dtype)


def jvp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_t: Tensor | None,
    shift_t: Tensor | None,
    scale_t: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return y and its tangent ẏ [B, N, D].

        ẋ̂ = r (ẋ - mean(ẋ) - x̂ mean(x̂ ∘ (ẋ - mean(ẋ)))),  r = (var(x) + eps)^-1/2
        ẏ = (1 + scale) ∘ ẋ̂ + scalė ∘ x̂ + shifṫ

    Args:
        x, shift, scale, eps: as in `modulated_layer_norm`.
        x_t, shift_t, scale_t: the tangents ẋ, shifṫ and scalė, of their primals' shapes; None is 0.
    """
    x_hat, rstd = _normalised(x, eps)
    y = _modulated(x_hat, shift, scale)
    y_t = torch.zeros_like(y)
    if x_t is not None:
        x_t = x_t.to(x_hat.dtype)
        x_t = x_t - x_t.mean(-1, keepdim=True)
        x_hat_t = rstd * (x_t - x_hat * (x_hat * x_t).mean(-1, keepdim=True))
        y_t = y_t + (1 + scale.to(x_hat.dtype)[:, None]) * x_hat_t
    if scale_t is not None:
        y_t = y_t + scale_t.to(x_hat.dtype)[:, None] * x_hat
    if shift_t is not None:
        y_t = y_t + shift_t.to(x_hat.dtype)[:, None]
    return y.to(x.dtype), y_t.to(x.dtype)


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x̂ [B, N, D] and r [B, N, 1]."""
    x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    centred = x - x.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * rstd, rstd


def _modulated(x_hat: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    shift, scale = (t.to(x_hat.dtype)[:, None] for t in (shift, scale))
    return (1 + scale) * x_hat + shift
