"""The modulated norm and its tangent in chunks of rows, in torch operations: the CPU's fast path.

A chunk and what is made of it stay in the cache: x and ẋ are read once, y and ẏ written once.

The Jacobian of x -> x̂ is symmetric: J = r (1 - 11ᵀ/D - x̂x̂ᵀ/D) in a row. So the derivative along ẋ
is what a backward pass makes of ẋ, for which torch has a kernel of one pass:

    ẋ̂ = J ẋ = J (ẋ - mean(ẋ)) = native_layer_norm_backward(ẋ - mean(ẋ))

The kernel sums ẋ ∘ x and takes mean(x) Σ ẋ off. Where both rows have a mean, that would be the
small difference of two large numbers; J does not see the mean, so it goes first.

16-bit inputs are computed in float32.

Shapes: B batch, N tokens, D width. A block has n elements of the batch and c of their rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ENTRIES = 1 << 16  # of x in a block, for each thread
SMALL_ENTRIES = 1 << 14  # of an element of the batch that is not worth calls of its own

_norm = torch.ops.aten.native_layer_norm
_norm_backward = torch.ops.aten.native_layer_norm_backward


class _Blocks(NamedTuple):
    """Whole elements of the batch where several fit, else rows of one element."""

    elements: int
    rows: int
    of_an_element: int

    def tiles(self, t: Tensor) -> list[Tensor]:
        """[B, N, ·] -> a view [n, c, ·] for each block."""
        return [tile for part in t.split(self.elements) for tile in part.split(self.rows, 1)]

    def vectors(self, t: Tensor) -> list[Tensor]:
        """[B, D] -> a view [n, 1, D] for each block."""
        parts = t[:, None].split(self.elements)
        return [part for part in parts for _ in range(self.of_an_element)]


def forward(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return y [B, N, D], and mean and r of x [B, N] in float32 or better.

    Args:
        x: [B, N, D].
        shift, scale: [B, D].
        eps: added to the variance.
    """
    y, mean, rstd = _pass(x, shift, scale, None, eps)
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
    """Return y, ẏ [B, N, D], mean and r [B, N]; tangents as their primals, None is 0."""
    y_t = x.new_empty(x.shape)
    y, mean, rstd = _pass(x, shift, scale, (y_t, x_t, shift_t, scale_t), eps)
    return y, y_t, mean, rstd


def backward(
    x: Tensor, scale: Tensor, mean: Tensor, rstd: Tensor, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx [B, N, D], dshift and dscale [B, D] of the primal.

    Args:
        x, scale: as in `forward`.
        mean, rstd: what it returned.
        grad_y: dy [B, N, D].
    """
    working, (batch, tokens, width) = mean.dtype, x.shape
    small = tokens * width < SMALL_ENTRIES
    blocks = _blocks(x, batch if small else 1)
    grad_x = x.new_empty(x.shape)
    grad_shift, grad_scale = (x.new_zeros(scale.shape, dtype=working) for _ in range(2))
    for X, G, m, r, w, dx, dshift, dscale in zip(
        *(blocks.tiles(t) for t in (x, grad_y, mean[..., None], rstd[..., None])),
        blocks.vectors(1 + scale.to(working)),
        blocks.tiles(grad_x),
        blocks.vectors(grad_shift),
        blocks.vectors(grad_scale),
        strict=True,
    ):
        X, G = X.to(working), G.to(working)
        if small:
            dx.copy_(_through_norm(G * w, X, m, r))
            dshift.add_(G.sum(1, keepdim=True))
            dscale.add_((X - m).mul_(r).mul_(G).sum(1, keepdim=True))
        else:
            w = w[0, 0]
            of_x, of_w, of_b = _norm_backward(G, X, [width], m, r, w, w, [True, True, True])
            dx.copy_(of_x)
            dshift.add_(of_b)
            dscale.add_(of_w)
    return grad_x, grad_shift.to(scale.dtype), grad_scale.to(scale.dtype)


def _pass(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    tangent: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None] | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, mean and r; fill ẏ, the first of `tangent` before ẋ, shifṫ and scalė."""
    working = torch.float64 if x.dtype == torch.float64 else torch.float32
    blocks = _blocks(x, x.shape[0])
    y = x.new_empty(x.shape)
    shift, weight = shift.to(working), 1 + scale.to(working)
    tiles = blocks.tiles(x), blocks.tiles(y), blocks.vectors(shift), blocks.vectors(weight)
    moving = []
    if tangent is not None:
        y_t, x_t, shift_t, scale_t = tangent
        nothing = [None] * len(tiles[0])
        shift_t = torch.zeros_like(shift) if shift_t is None else shift_t.to(working)
        tiles_t = nothing if x_t is None else blocks.tiles(x_t)
        scales_t = nothing if scale_t is None else blocks.vectors(scale_t.to(working))
        moving = [*zip(blocks.tiles(y_t), tiles_t, blocks.vectors(shift_t), scales_t, strict=True)]
    # Its path for weights is the faster one.
    ones, zeros = (x.new_full(x.shape[2:], value, dtype=working) for value in (1, 0))
    means, rstds = [], []
    for i, (X, Y, b, w) in enumerate(zip(*tiles, strict=True)):
        X = X.to(working)
        x_hat, m, r = _norm(X, x.shape[2:], ones, zeros, eps)
        means.append(m.flatten())
        rstds.append(r.flatten())
        torch.addcmul(b, x_hat, w, out=Y)
        if moving:
            _write_tangent(*moving[i], x=X, x_hat=x_hat, mean=m, rstd=r, weight=w)
    mean, rstd = (torch.cat(parts).view(x.shape[:2]) for parts in (means, rstds))
    return y, mean, rstd


def _write_tangent(
    y_t: Tensor,
    x_t: Tensor | None,
    shift_t: Tensor,
    scale_t: Tensor | None,
    *,
    x: Tensor,
    x_hat: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
) -> None:
    """Fill ẏ [n, c, D] of a block; all but ẏ and ẋ are in the working dtype."""
    # What is written last is the room to work in, where its dtype allows that.
    total = y_t if y_t.dtype == x.dtype else torch.empty_like(x)
    x_hat_t = None
    if x_t is not None:
        x_t = x_t.to(x.dtype)
        centred = torch.sub(x_t, x_t.mean(2, keepdim=True), out=total)
        x_hat_t = _through_norm(centred, x, mean, rstd)
    if scale_t is None:
        total.copy_(shift_t)
    else:
        torch.addcmul(shift_t, x_hat, scale_t, out=total)
    if x_hat_t is not None:
        total.addcmul_(x_hat_t, weight)
    if total is not y_t:
        y_t.copy_(total)


def _through_norm(v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Return J v, row by row."""
    only_x = [True, False, False]
    return _norm_backward(v, x, x.shape[2:], mean, rstd, None, None, only_x)[0]


def _blocks(x: Tensor, most: int) -> _Blocks:
    """Cut x [B, N, D] into blocks of at most `most` elements of the batch."""
    _, tokens, width = x.shape
    # Another device has launches to save, and no cache to keep a block in.
    entries = CHUNK_ENTRIES * torch.get_num_threads() if x.device.type == "cpu" else x.numel()
    rows = max(1, entries // width)
    of_an_element = -(-tokens // rows)
    return _Blocks(max(1, min(rows // tokens, most)), -(-tokens // of_an_element), of_an_element)
