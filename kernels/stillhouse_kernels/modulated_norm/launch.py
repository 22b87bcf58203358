"""Grids of the Triton kernels of the modulated norm: tensors in, tensors out, no autograd.

The three functions have the signatures of `streaming`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stillhouse_kernels.launching import DTYPES, aligned, compute_capability, trimmed
from stillhouse_kernels.modulated_norm import kernel


def refusal(x: Tensor) -> str | None:
    """Return which limit of the kernels x [B, N, D] exceeds, or None."""
    if x.dtype not in DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        dtype = str(x.dtype).removeprefix("torch.")
        return f"the dtype of x is {dtype}, the kernel takes {known}"
    if x.shape[-1] > kernel.MAX_WIDTH:
        return f"the width is {x.shape[-1]}, the kernel takes at most {kernel.MAX_WIDTH}"
    capability, least = compute_capability(x), kernel.MIN_CAPABILITY
    if 0 < capability < least:
        return f"{x.device} has compute capability {capability / 10}, the kernel needs {least / 10}"
    return None


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B, N, D] in x's dtype, mean and r of x [B, N] in float32.

    Args:
        x: [B, N, D].
        shift, scale: [B, D].
        eps: added to the variance.
    """
    y, _, mean, rstd = _forward((x, shift, scale), None, eps)
    return y, mean, rstd


def jvp(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_t: Tensor | None,
    shift_t: Tensor | None,
    scale_t: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y and its tangent [B, N, D], mean and r [B, N].

    Args:
        x, shift, scale, eps: as in `forward`.
        x_t, shift_t, scale_t: tangents in their primals' dtype and any layout; None is 0.
    """
    return _forward((x, shift, scale), (x_t, shift_t, scale_t), eps)


def backward(
    x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [B, N, D], dshift and dscale [B, D] of the primal.

    Args:
        x, scale: as in `forward`.
        mean, rstd: what it returned.
        grad_y: dy [B, N, D].
    """
    width = x.shape[2]
    x, scale, grad_y = aligned(x), aligned(scale), aligned(grad_y)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    parts = (x.shape[0], _division(x)[1], x.shape[2])
    partial_shift, partial_scale = (
        torch.empty(parts, dtype=torch.float32, device=x.device) for _ in range(2)
    )
    arguments = {
        **_strided("x", x),
        **_strided("scale", scale),
        **_strided("grad_y", grad_y),
        "mean_ptr": mean.contiguous(),
        "rstd_ptr": rstd.contiguous(),
        "grad_x_ptr": grad_x,
        "partial_shift_ptr": partial_shift,
        "partial_scale_ptr": partial_scale,
    }
    _run(kernel.norm_backward, x, width, arguments)
    grad_shift, grad_scale = (t.sum(1).to(scale.dtype) for t in (partial_shift, partial_scale))
    return trimmed(grad_x, width), trimmed(grad_shift, width), trimmed(grad_scale, width)


def _forward(
    primals: tuple[Tensor, ...], tangents: tuple[Tensor | None, ...] | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, its tangent (y again where there are none), mean and r."""
    width = primals[0].shape[2]
    primals = x, *_ = tuple(aligned(t) for t in primals)
    # Without tangents nothing of them is read; zeros take the memory of one row.
    moving = primals
    if tangents is not None:
        zeros = x.new_zeros(x.shape[2:])
        pairs = zip(primals, tangents, strict=True)
        moving = [zeros.expand(p.shape) if t is None else aligned(t) for p, t in pairs]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y_t = y if tangents is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (torch.empty(x.shape[:2], dtype=torch.float32, device=x.device) for _ in range(2))
    arguments = {"y_ptr": y, "y_t_ptr": y_t, "mean_ptr": mean, "rstd_ptr": rstd, "eps": eps}
    for name, primal, tangent in zip(("x", "shift", "scale"), primals, moving, strict=True):
        arguments |= _strided(name, primal) | _strided(f"{name}_t", tangent)
    arguments["HAS_TANGENT"] = tangents is not None
    _run(kernel.norm_forward, x, width, arguments)
    return trimmed(y, width), trimmed(y_t, width), mean, rstd


def _strided(name: str, t: Tensor) -> dict[str, Any]:
    """Arguments of an aligned [B, N, D] or [B, D]."""
    axes = ("batch", "row")[: t.ndim - 1]
    return {f"{name}_ptr": t, **{f"{name}_{a}_stride": t.stride(i) for i, a in enumerate(axes)}}


def _division(x: Tensor) -> tuple[int, int]:
    """How many rows a program takes, and how many programs an element of the batch."""
    batch, tokens, columns = x.shape
    rows = kernel.rows_of_a_program(batch, tokens, kernel.configuration(columns)["BLOCK_ROWS"])
    return rows, -(-tokens // rows)


def _run(function: Any, x: Tensor, width: int, arguments: dict[str, Any]) -> None:
    """Launch the programs of every element of x [B, N, columns]."""
    batch, tokens, columns = x.shape
    rows, programs = _division(x)
    sizes = {"tokens": tokens, "width": width, "columns": columns, "rows": rows}
    with torch.cuda.device_of(x):
        function[(batch * programs,)](**arguments, **sizes, **kernel.configuration(columns))
