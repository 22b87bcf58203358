"""What the grids of several operations share: tensors as the kernels are compiled for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse_kernels.tiles import has_wide_mask

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_AXES = ("batch", "head", "row")


def compute_capability(tensor: Tensor) -> int:
    """Return that of the tensor's device as 80, 90, ...; 0 for the interpreter."""
    if not tensor.is_cuda:
        return 0
    # Not get_device_capability, which torch.compile does not fold into a constant.
    device = torch.cuda.get_device_properties(tensor.device)
    return 10 * device.major + device.minor


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor as the kernels are compiled for it; a copy where it lies otherwise.

    Columns are adjacent and a multiple of 16 (the rest is 0), strides and address are multiples of
    16, so that loads are wide and the registers suffice, and the row offsets of a head fit into 32
    bits (a mask's need not).
    """
    if padding := -tensor.shape[-1] % 16:
        return F.pad(tensor, (0, padding))
    *outer, column_stride = tensor.stride()
    wide = all(stride % 16 == 0 for stride in outer) and tensor.data_ptr() % 16 == 0
    near = tensor.shape[-2] * outer[-1] < 2**31
    if column_stride == 1 and wide and (near or tensor.is_contiguous()):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def trimmed(padded: Tensor, width: int) -> Tensor:
    """Return the first `width` columns, those before `aligned`; a copy where there are more."""
    return padded if padded.shape[-1] == width else padded[..., :width].contiguous()


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """Return the strides of an aligned [B, heads, rows, columns] as arguments of a kernel."""
    return {f"{name}_{axis}_stride": tensor.stride(i) for i, axis in enumerate(_AXES)}


def mask_arguments(q: Tensor, mask: Tensor | None) -> dict[str, Any]:
    """Return the mask of an attention as arguments of a kernel, in the type that `hide` reads.

    Args:
        q: queries [B, h, N, d].
        mask: None, or bool [B or 1, h or 1, N, M], True = attend.
    """
    if mask is None:
        unread = torch.empty(0, dtype=torch.uint8, device=q.device)
        zeros = {f"mask_{axis}_stride": 0 for axis in _AXES}
        return {"mask_ptr": unread, **zeros, "HAS_MASK": False}
    wide = has_wide_mask(compute_capability(q), 8 * q.dtype.itemsize)
    # An axis along which the mask is expanded would be filled in by a cast, or by padding.
    mask = mask[tuple(slice(None if stride else 1) for stride in mask.stride()[:3])]
    allowed = aligned(mask.to(torch.int32) if wide else mask.view(torch.uint8))
    allowed = allowed.expand(*q.shape[:3], allowed.shape[-1])
    return {"mask_ptr": allowed, **strides("mask", allowed), "HAS_MASK": True}
