"""Triton kernels of the modulated norm, its derivative along tangents, and its gradients.

In a row, with D the width, m = mean(x), r = (var(x) + eps)^-1/2, x̂ = r (x - m) and w = 1 + scale:

    y  = w ∘ x̂ + shift
    tx̂ = r (tx - mean(tx) - x̂ mean(x̂ ∘ tx))
    ty = w ∘ tx̂ + tscale ∘ x̂ + tshift
    dx = r (g - mean(g) - x̂ mean(x̂ ∘ g)),  g = w ∘ dy

and over the rows of an element of the batch  dshift = Σ dy,  dscale = Σ dy ∘ x̂.

A program takes some rows of one element, a few at a time, and holds them whole: memory is read and
written once, but for what depends on the element alone, which stays in the cache. The sums over
rows come out as one partial sum a program, which torch adds up: no atomics, hence the same bits at
every run.

Letters of a tile's name are its axes: R rows, D the width, padded to a power of two. Of these,
`columns` are in memory: the width, padded with zeros to a multiple of 16.
"""

from collections.abc import Iterator
from itertools import product

import triton
import triton.language as tl

from stillhouse_kernels.compilation import Compilation

MAX_WIDTH = 8192
MIN_CAPABILITY = 80
WIDTHS = (512, 1024, 2048, 4096, MAX_WIDTH)  # that a row is padded to
PROGRAMS = 512  # a few for each multiprocessor; below that a program takes fewer rows
MOST_ROWS = 32  # of a program: the partial sums then are an eighth of bfloat16 rows

# One compiled kernel serves every length: 1 and multiples of 16 are not compiled apart.
_SIZES = ("tokens", "width", "rows")


@triton.jit
def _load_rows(pointer, row, row_stride, tokens, columns, BLOCK_WIDTH: tl.constexpr):
    """Rows of a matrix [tokens, columns] in float32, 0 outside of it."""
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < tokens) & (column[None, :] < columns)
    address = pointer + row[:, None].to(tl.int64) * row_stride + column[None, :]
    return tl.load(address, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(pointer, tile, row, tokens, columns, BLOCK_WIDTH: tl.constexpr):
    """Rows into a contiguous matrix [tokens, columns]."""
    column = tl.arange(0, BLOCK_WIDTH)
    inside = (row[:, None] < tokens) & (column[None, :] < columns)
    address = pointer + row[:, None].to(tl.int64) * columns + column[None, :]
    tl.store(address, tile.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _load_vector(pointer, columns, BLOCK_WIDTH: tl.constexpr):
    """[columns] as [1, BLOCK_WIDTH] in float32, 0 outside of it."""
    column = tl.arange(0, BLOCK_WIDTH)
    return tl.load(pointer + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _through_norm(v_RD, x_hat_RD, rstd_R, width):
    """r (v - mean(v) - x̂ mean(x̂ ∘ v)): the Jacobian of x -> x̂, which is symmetric, times v.

    Outside of the width v and x̂ are 0, and what comes out is of no account.
    """
    # v without its mean: where x̂ has one, by rounding, the two do not multiply.
    v_RD -= (tl.sum(v_RD, 1) / width)[:, None]
    along_R = tl.sum(v_RD * x_hat_RD, 1) / width
    return rstd_R[:, None] * (v_RD - x_hat_RD * along_R[:, None])


@triton.jit(do_not_specialize=_SIZES)
def norm_forward(
    x_ptr,
    shift_ptr,
    scale_ptr,
    x_t_ptr,
    shift_t_ptr,
    scale_t_ptr,
    y_ptr,
    y_t_ptr,
    mean_ptr,
    rstd_ptr,
    x_batch_stride,
    x_row_stride,
    shift_batch_stride,
    scale_batch_stride,
    x_t_batch_stride,
    x_t_row_stride,
    shift_t_batch_stride,
    scale_t_batch_stride,
    tokens,
    width,
    columns,
    rows,
    eps,
    HAS_TANGENT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """y, mean and r of some rows, and ty where there is a tangent."""
    programs = tl.cdiv(tokens, rows)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    first_row = tl.program_id(0) % programs * rows
    x_ptr += batch * x_batch_stride
    x_t_ptr += batch * x_t_batch_stride
    y_ptr += batch * tokens * columns
    y_t_ptr += batch * tokens * columns
    shift_ptr += batch * shift_batch_stride
    scale_ptr += batch * scale_batch_stride
    shift_t_ptr += batch * shift_t_batch_stride
    scale_t_ptr += batch * scale_t_batch_stride
    inside_D = (tl.arange(0, BLOCK_WIDTH) < width)[None, :]
    for start in range(first_row, tl.minimum(first_row + rows, tokens), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        x_RD = _load_rows(x_ptr, row, x_row_stride, tokens, columns, BLOCK_WIDTH)
        # Both loads at once, to wait once; of a wider row the registers would not hold both.
        if HAS_TANGENT and BLOCK_WIDTH <= 4096:
            x_t_RD = _load_rows(x_t_ptr, row, x_t_row_stride, tokens, columns, BLOCK_WIDTH)
        mean_R = tl.sum(x_RD, 1) / width
        centred_RD = tl.where(inside_D, x_RD - mean_R[:, None], 0.0)
        rstd_R = tl.rsqrt(tl.sum(centred_RD * centred_RD, 1) / width + eps)
        x_hat_RD = centred_RD * rstd_R[:, None]
        weight_D = 1.0 + _load_vector(scale_ptr, columns, BLOCK_WIDTH)
        y_RD = weight_D * x_hat_RD + _load_vector(shift_ptr, columns, BLOCK_WIDTH)
        _store_rows(y_ptr, y_RD, row, tokens, columns, BLOCK_WIDTH)
        tl.store(mean_ptr + batch * tokens + row, mean_R, mask=row < tokens)
        tl.store(rstd_ptr + batch * tokens + row, rstd_R, mask=row < tokens)
        if HAS_TANGENT:
            if BLOCK_WIDTH > 4096:
                weight_D = 1.0 + _load_vector(scale_ptr, columns, BLOCK_WIDTH)
                x_t_RD = _load_rows(x_t_ptr, row, x_t_row_stride, tokens, columns, BLOCK_WIDTH)
            y_t_RD = weight_D * _through_norm(x_t_RD, x_hat_RD, rstd_R, width)
            y_t_RD += _load_vector(scale_t_ptr, columns, BLOCK_WIDTH) * x_hat_RD
            y_t_RD += _load_vector(shift_t_ptr, columns, BLOCK_WIDTH)
            _store_rows(y_t_ptr, y_t_RD, row, tokens, columns, BLOCK_WIDTH)


@triton.jit(do_not_specialize=_SIZES)
def norm_backward(
    x_ptr,
    scale_ptr,
    grad_y_ptr,
    mean_ptr,
    rstd_ptr,
    grad_x_ptr,
    partial_shift_ptr,
    partial_scale_ptr,
    x_batch_stride,
    x_row_stride,
    scale_batch_stride,
    grad_y_batch_stride,
    grad_y_row_stride,
    tokens,
    width,
    columns,
    rows,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """dx of some rows, and their part of dshift and dscale [B, programs of an element, D]."""
    programs = tl.cdiv(tokens, rows)
    batch = (tl.program_id(0) // programs).to(tl.int64)
    first_row = tl.program_id(0) % programs * rows
    x_ptr += batch * x_batch_stride
    grad_y_ptr += batch * grad_y_batch_stride
    grad_x_ptr += batch * tokens * columns
    inside_D = (tl.arange(0, BLOCK_WIDTH) < width)[None, :]
    scale_ptr += batch * scale_batch_stride
    shift_RD = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    scale_RD = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    for start in range(first_row, tl.minimum(first_row + rows, tokens), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        x_RD = _load_rows(x_ptr, row, x_row_stride, tokens, columns, BLOCK_WIDTH)
        grad_y_RD = _load_rows(grad_y_ptr, row, grad_y_row_stride, tokens, columns, BLOCK_WIDTH)
        mean_R = tl.load(mean_ptr + batch * tokens + row, mask=row < tokens, other=0.0)
        rstd_R = tl.load(rstd_ptr + batch * tokens + row, mask=row < tokens, other=0.0)
        x_hat_RD = tl.where(inside_D, (x_RD - mean_R[:, None]) * rstd_R[:, None], 0.0)
        weight_D = 1.0 + _load_vector(scale_ptr, columns, BLOCK_WIDTH)
        grad_x_RD = _through_norm(weight_D * grad_y_RD, x_hat_RD, rstd_R, width)
        _store_rows(grad_x_ptr, grad_x_RD, row, tokens, columns, BLOCK_WIDTH)
        shift_RD += grad_y_RD
        scale_RD += grad_y_RD * x_hat_RD
    column = tl.arange(0, BLOCK_WIDTH)
    slot = tl.program_id(0).to(tl.int64) * columns
    tl.store(partial_shift_ptr + slot + column, tl.sum(shift_RD, 0), mask=column < columns)
    tl.store(partial_scale_ptr + slot + column, tl.sum(scale_RD, 0), mask=column < columns)


def configuration(width: int) -> dict[str, int]:
    """Return the constexprs and options of both kernels, for any chip and the interpreter.

    Args:
        width: of a row, at most `MAX_WIDTH`.
    """
    padded = next(w for w in WIDTHS if width <= w)
    # 8 entries of a tile for each thread: a 16-byte load of 16-bit entries.
    warps = min(max(4, padded // 256), 16)
    rows = max(1, 1024 // padded)
    return {"BLOCK_ROWS": rows, "BLOCK_WIDTH": padded, "num_warps": warps, "num_stages": 1}


def rows_of_a_program(batch: int, tokens: int, block_rows: int) -> int:
    """Return how many rows a program takes, a multiple of `block_rows`."""
    rows = max(MOST_ROWS, block_rows)
    while rows > block_rows and batch * -(-tokens // rows) < PROGRAMS:
        rows //= 2
    return rows


def compilations(capability: int) -> Iterator[Compilation]:
    """Every specialisation that a launch can choose on a chip.

    Args:
        capability: compute capability as 80, 90 or 100.
    """
    kernels = ((norm_forward, False), (norm_forward, True), (norm_backward, None))
    for (kernel, tangent), width, dtype in product(kernels, WIDTHS, ("fp32", "fp16", "bf16")):
        constexprs = configuration(width)
        num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
        constexprs |= {} if tangent is None else {"HAS_TANGENT": tangent}
        arguments = [name for name in kernel.arg_names if name not in constexprs]
        yield Compilation(
            kernel=kernel,
            label=f"width {width}, {dtype}{', tangent' if tangent else ''}",
            signature={name: _triton_type(name, dtype) for name in arguments},
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=num_stages,
            divisible=tuple(n for n in arguments if n.endswith("_stride") or n == "columns"),
            matrix_product=False,
        )


def _triton_type(argument: str, dtype: str) -> str:
    if not argument.endswith("_ptr"):
        return "fp32" if argument == "eps" else "i32"
    in_float32 = argument.startswith(("mean", "rstd", "partial"))
    return "*fp32" if in_float32 else f"*{dtype}"
