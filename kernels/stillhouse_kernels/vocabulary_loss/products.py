"""The three products of a chunk of tokens, by the library, into buffers that are there already.

n tokens of a chunk, H width, V vocabulary. Logits, dX and dW are float32 (float64 for float64)
whatever the operands are. On a GPU 16-bit operands multiply as they are and accumulate in float32.
Elsewhere the library would round the result to 16 bits, so the weights are widened block by block:
one conversion an entry beside 2n operations.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_WIDENED_ROWS = 8192  # of the weight at a time


def native(operand: Tensor, accumulator: torch.dtype) -> bool:
    """Whether the library multiplies this dtype into the accumulator's without a conversion."""
    return operand.dtype == accumulator or _mixed(operand, accumulator)


def _mixed(operand: Tensor, accumulator: torch.dtype) -> bool:
    return (
        operand.is_cuda
        and operand.dtype in (torch.float16, torch.bfloat16)
        and accumulator == torch.float32
        and hasattr(torch.ops.aten.mm, "dtype_out")
        and hasattr(torch.ops.aten.addmm, "dtype_out")
    )


def _widened(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, weight.shape[0], _WIDENED_ROWS):
        block = slice(start, start + _WIDENED_ROWS)
        yield block, weight[block].to(dtype)


def logits_(out: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """out [n, V] = hidden [n, H] weightᵀ [H, V] + bias."""
    if _mixed(weight, out.dtype):
        torch.ops.aten.mm.dtype_out(hidden, weight.t(), out.dtype, out=out)
    elif weight.dtype == out.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        hidden = hidden.to(out.dtype)
        for block, w in _widened(weight, out.dtype):
            torch.mm(hidden, w.t(), out=out[:, block])
    if bias is not None:
        out.add_(bias)


def hidden_gradient_(out: Tensor, G: Tensor, weight: Tensor, alpha: float) -> None:
    """out [n, H] = alpha · G [n, V] weight [V, H]."""
    if _mixed(weight, out.dtype):
        torch.ops.aten.mm.dtype_out(G, weight, out.dtype, out=out)
        out.mul_(alpha)
    elif weight.dtype == out.dtype:
        torch.addmm(out, G, weight, beta=0, alpha=alpha, out=out)
    else:
        out.zero_()
        for block, w in _widened(weight, out.dtype):
            out.addmm_(G[:, block].to(out.dtype), w, alpha=alpha)


def weight_gradient_(out: Tensor, G: Tensor, hidden: Tensor, alpha: float, *, first: bool) -> None:
    """out [V, H] += alpha · Gᵀ [V, n] hidden [n, H]; the first product overwrites."""
    beta = 0 if first else 1
    if _mixed(hidden, out.dtype):
        torch.ops.aten.addmm.dtype_out(
            out, G.t(), hidden, out.dtype, beta=beta, alpha=alpha, out=out
        )
    else:
        G, hidden = G.to(out.dtype), hidden.to(out.dtype)
        torch.addmm(out, G.t(), hidden, beta=beta, alpha=alpha, out=out)
