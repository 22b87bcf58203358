"""What comes into a modulated norm: cast and checked before anything runs.

B batch, N tokens, D width.
"""

import math

import torch
from torch import Tensor

from stillhouse_kernels.attention_inputs import check_same_kind
from stillhouse_kernels.dispatch import choose_backend


def autocast(t: Tensor) -> Tensor:
    """Cast as autocast casts `layer_norm`'s inputs on CUDA: 16-bit types to float32."""
    device = t.device.type
    if t.dtype not in (torch.float16, torch.bfloat16):
        return t
    enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return t.float() if enabled else t


def check(function: str, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> None:
    """Refuse what does not fit together.

    Args:
        function: the name that the message begins with.
        x: [B, N, D].
        shift, scale: [B, D] or [B, 1, D].
        eps: 0 or more.

    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, and for eps.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(
            f"{function}: x {tuple(x.shape)}: expected [batch, tokens, width], no size 0"
        )
    B, _, D = x.shape
    for name, t in (("shift", shift), ("scale", scale)):
        if t.shape != (B, D) and t.shape != (B, 1, D):
            raise ValueError(
                f"{function}: {name} {tuple(t.shape)}, x {tuple(x.shape)}: expected {name} "
                f"[batch, width] or [batch, 1, width] = ({B}, {D}) or ({B}, 1, {D})"
            )
    check_same_kind(function, {"x": x, "shift": shift, "scale": scale})
    if not 0 <= eps < math.inf:
        raise ValueError(f"{function}: eps={eps}: expected 0 or more")


def of_elements(t: Tensor) -> Tensor:
    """[B, D] or [B, 1, D] -> [B, D]."""
    return t.squeeze(1) if t.ndim == 3 else t


def backend_for(backend: str, x: Tensor) -> str:
    """Return `reference`, `streaming` or `triton`, as `choose_backend` does."""
    if backend == "triton" or (backend == "auto" and x.is_cuda):
        return choose_backend(backend, x.device, triton_refuses=_refusal(x))
    return choose_backend(backend, x.device)


def _refusal(x: Tensor) -> str | None:
    """Why the Triton kernels cannot take this; None also where triton is missing."""
    try:
        from stillhouse_kernels.modulated_norm.launch import refusal
    except ModuleNotFoundError:
        return None
    return refusal(x)
