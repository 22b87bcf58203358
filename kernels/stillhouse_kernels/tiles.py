"""Pieces of the Triton kernels of several operations: tiles loaded, stored and masked.

A tile [rows, columns] holds rows of a matrix, padded to powers of 2. No torch here, as in every
`kernel.py`.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(
    pointer, row, row_stride, rows, head_dim, HEAD_DIM: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows of a matrix [rows, head_dim], 0 outside of it."""
    column = tl.arange(0, HEAD_DIM)
    inside = (row[:, None] < rows) & (column[None, :] < head_dim)
    tile = tl.load(pointer + row[:, None] * row_stride + column[None, :], mask=inside, other=0.0)
    # The interpreter keeps bfloat16 as integers and multiplies these.
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store_tile(pointer, tile, row, rows, head_dim, HEAD_DIM: tl.constexpr):
    """Rows into a contiguous matrix [rows, head_dim]."""
    column = tl.arange(0, HEAD_DIM)
    inside = (row[:, None] < rows) & (column[None, :] < head_dim)
    address = pointer + row[:, None] * head_dim + column[None, :]
    tl.store(address, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def hide(
    s, query, key, queries, keys, offset, partial, mask_ptr, mask_row_stride, HAS_MASK: tl.constexpr
):
    """Scores with -inf where the query may not see the key; query and key broadcast to the tile.

    `partial` says whether the edge of the keys or the diagonal cuts the tile: most need no test.
    """
    if partial:
        s = tl.where(key <= tl.minimum(query + offset, keys - 1), s, float("-inf"))
    if HAS_MASK:
        address = mask_ptr + query.to(tl.int64) * mask_row_stride + key
        allowed = tl.load(address, mask=(query < queries) & (key < keys), other=0)
        s = tl.where(allowed != 0, s, float("-inf"))
    return s


def has_wide_mask(capability: int, bits: int) -> bool:
    """Whether the mask that `hide` reads comes as int32, and not as bytes.

    Beside loads of bytes Triton 3.7 multiplies float32 in tf32 on chips with tensor memory,
    whatever the kernel says.

    Args:
        capability: of the device, as 80 or 90; 0 is the interpreter.
        bits: of the tensors' dtype.
    """
    return bits == 32 and 100 <= capability < 120
