"""The Triton kernels of shared attention, and the tiles of each on a chip."""

from collections.abc import Iterator
from itertools import product

from stillhouse_kernels.compilation import Compilation
from stillhouse_kernels.shared_attention.backward_kernels import (
    score_backward_k,
    score_backward_q,
    value_backward,
)
from stillhouse_kernels.shared_attention.forward_kernels import follower_forward, leader_forward
from stillhouse_kernels.tiles import has_wide_mask

MAX_HEAD_DIM = 128
MIN_CAPABILITY = 80

_KERNELS = (leader_forward, follower_forward, value_backward, score_backward_q, score_backward_k)
_COLUMNS = dict(zip((kernel.__name__ for kernel in _KERNELS), (0, 0, 1, 2, 3), strict=True))

# Chip, padded head dim and bits of the dtype: (BLOCK_M, BLOCK_N, num_warps, num_stages) of the two
# forward kernels, value_backward, score_backward_q and score_backward_k. The largest tiles that
# leave nothing in local memory, masked or not. sm_80's fit into the 99 KiB of sm_86 and sm_89 too.
# Products in float32 run outside the matrix unit, from registers, hence the small tiles.
_TILES = {
    (80, 64, 16): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    (80, 64, 32): ((64, 64, 8, 2), (32, 64, 8, 1), (64, 64, 8, 1), (64, 64, 8, 1)),
    (80, 128, 16): ((128, 64, 8, 2), (32, 128, 8, 3), (64, 64, 8, 3), (64, 64, 8, 2)),
    (80, 128, 32): ((32, 32, 4, 2), (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
    (90, 64, 16): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 64, 8, 2), (128, 64, 8, 2)),
    (90, 64, 32): ((64, 64, 8, 2), (64, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
    (90, 128, 16): ((128, 64, 8, 3), (32, 128, 8, 3), (128, 64, 8, 2), (64, 64, 8, 3)),
    (90, 128, 32): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1)),
    (100, 64, 16): ((128, 64, 8, 3), (64, 128, 8, 2), (128, 128, 8, 2), (64, 128, 8, 2)),
    (100, 64, 32): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 1), (32, 64, 8, 1)),
    (100, 128, 16): ((128, 64, 8, 3), (64, 128, 8, 1), (128, 64, 8, 2), (64, 64, 8, 3)),
    (100, 128, 32): ((64, 64, 8, 2), (32, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)),
}
# Small, so that tensors of a test have several.
INTERPRETER_TILE = (32, 32, 4, 1)


def configuration(name: str, capability: int, head_dim: int, bits: int) -> dict[str, int]:
    """Return the constexprs and options that a kernel is launched with.

    Args:
        name: the kernel's.
        capability: of the device, as 80 or 90; 0 is the interpreter. One that the table lacks takes
            the nearest lower chip's entry.
        head_dim: at most `MAX_HEAD_DIM`.
        bits: of the tensors' dtype.
    """
    padded = 64 if head_dim <= 64 else MAX_HEAD_DIM
    tile = INTERPRETER_TILE
    if capability:
        # sm_120 has sm_89's shared memory and no tensor memory.
        chip = 80 if capability >= 120 else max(c for c in (80, 90, 100) if c <= capability)
        tile = _TILES[chip, padded, bits][_COLUMNS[name]]
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    return {"HEAD_DIM": padded, **dict(zip(names, tile, strict=True))}


def compilations(capability: int) -> Iterator[Compilation]:
    """Every specialisation that a launch on ordinary tensors can choose on a chip.

    Args:
        capability: compute capability as 80, 90 or 100.
    """
    dtypes = (("fp32", 32), ("fp16", 16), ("bf16", 16))
    for kernel, head_dim, (dtype, bits), masked in product(
        _KERNELS, (64, 128), dtypes, (False, True)
    ):
        constexprs = configuration(kernel.__name__, capability, head_dim, bits)
        num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
        constexprs |= {"HAS_MASK": masked, "UPCAST": False}
        arguments = [name for name in kernel.arg_names if name not in constexprs]
        mask = "*i32" if has_wide_mask(capability, bits) else "*u8"
        yield Compilation(
            kernel=kernel,
            label=f"head_dim {head_dim}, {dtype}{', masked' if masked else ''}",
            signature={name: _triton_type(name, dtype, mask) for name in arguments},
            constexprs=constexprs,
            num_warps=num_warps,
            num_stages=num_stages,
            divisible=tuple(n for n in arguments if n.endswith("_stride") or n == "head_dim"),
            matrix_product=bits == 16,
        )


def _triton_type(argument: str, dtype: str, mask: str) -> str:
    if argument.endswith("_ptr"):
        own = {"mask_ptr": mask, "lse_ptr": "*fp32", "delta_ptr": "*fp32"}
        return own.get(argument, f"*{dtype}")
    return "fp32" if argument.startswith("scale") else "i32"
