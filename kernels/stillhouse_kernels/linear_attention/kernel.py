"""The Triton kernels of ReLU linear attention, and the tiles of each on a chip."""

from collections.abc import Iterator
from itertools import product
from typing import Any

from stillhouse_kernels.compilation import Compilation
from stillhouse_kernels.linear_attention.backward_kernels import key_gradients, query_gradients
from stillhouse_kernels.linear_attention.forward_kernels import apply_queries, sum_keys

MAX_HEAD_DIM = 128
MIN_CAPABILITY = 80
PROGRAMS = 512  # that a launch should have, before chunks of tokens grow

_KERNELS = (sum_keys, apply_queries, query_gradients, key_gradients)
_COLUMNS = {kernel.__name__: i for i, kernel in enumerate(_KERNELS)}

# The tangents that a launch is given; others are filled up with zeros.
PATTERNS: dict[str, dict[str, dict[str, bool]]] = {
    "sum_keys": {"primal": {"HAS_TANGENT": False}, "tangent": {"HAS_TANGENT": True}},
    "apply_queries": {
        "primal": {"HAS_QUERY_TANGENT": False, "HAS_KEY_TANGENT": False},
        "query": {"HAS_QUERY_TANGENT": True, "HAS_KEY_TANGENT": False},
        "tangent": {"HAS_QUERY_TANGENT": True, "HAS_KEY_TANGENT": True},
    },
}

# Chip, padded dim and bits of the dtype: (BLOCK_E, BLOCK, num_warps, num_stages) of the four
# kernels, of which the last two take all columns at once. The largest tiles that leave nothing in
# local memory. sm_80's fit into the 99 KiB of sm_86 and sm_89 too. Products in float32 run outside
# the matrix unit, from registers, hence the small tiles.
_TILES = {
    (80, 32, 16): ((32, 64, 4, 3), (32, 128, 4, 3), (32, 32, 4, 3), (32, 128, 4, 3)),
    (80, 32, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (80, 64, 16): ((64, 32, 4, 3), (64, 32, 4, 3), (64, 32, 4, 3), (64, 64, 4, 3)),
    (80, 64, 32): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 2)),
    (80, 128, 16): ((64, 64, 8, 3), (128, 32, 8, 2), (128, 16, 8, 2), (128, 64, 8, 2)),
    (80, 128, 32): ((64, 16, 8, 2), (64, 16, 8, 1), (128, 16, 8, 1), (128, 16, 8, 2)),
    (90, 32, 16): ((32, 64, 8, 3), (32, 128, 4, 3), (32, 32, 4, 3), (32, 128, 4, 3)),
    (90, 32, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (90, 64, 16): ((64, 64, 4, 3), (64, 128, 8, 2), (64, 64, 8, 3), (64, 64, 4, 3)),
    (90, 64, 32): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 2)),
    (90, 128, 16): ((128, 32, 8, 3), (64, 64, 4, 3), (128, 32, 8, 3), (128, 64, 8, 3)),
    (90, 128, 32): ((64, 16, 8, 2), (64, 16, 8, 1), (128, 16, 16, 1), (128, 16, 8, 2)),
    (100, 32, 16): ((32, 32, 4, 3), (32, 128, 4, 3), (32, 64, 4, 3), (32, 64, 4, 3)),
    (100, 32, 32): ((32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2), (32, 32, 4, 2)),
    (100, 64, 16): ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 3), (64, 128, 8, 3)),
    (100, 64, 32): ((64, 32, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1), (64, 32, 8, 2)),
    (100, 128, 16): ((128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3)),
    (100, 128, 32): ((64, 16, 8, 2), (64, 16, 8, 1), (128, 16, 16, 1), (128, 16, 8, 2)),
}
# Small, so that tensors of a test have several.
INTERPRETER_TILE = (32, 16, 4, 1)


def configuration(name: str, capability: int, width: int, bits: int) -> dict[str, int]:
    """Return the constexprs and options that a kernel is launched with.

    Args:
        name: the kernel's.
        capability: of the device, as 80 or 90; 0 is the interpreter. One that the table lacks takes
            the nearest lower chip's entry.
        width: the larger of head dim and value dim, at most `MAX_HEAD_DIM`.
        bits: of the tensors' dtype.
    """
    padded = next(w for w in (32, 64, MAX_HEAD_DIM) if width <= w)
    tile = INTERPRETER_TILE
    if capability:
        # sm_120 has sm_89's shared memory and no tensor memory.
        chip = 80 if capability >= 120 else max(c for c in (80, 90, 100) if c <= capability)
        tile = _TILES[chip, padded, bits][_COLUMNS[name]]
    names = ("BLOCK_E", "BLOCK", "num_warps", "num_stages")
    options = {"HEAD_DIM": padded, **dict(zip(names, tile, strict=True))}
    if name not in PATTERNS:
        del options["BLOCK_E"]
    return options


def chunk_rows(rows: int, slots: int, width: int, block: int, capability: int) -> int:
    """Return how many tokens a program walks through: a rule of sizes, so that sums repeat.

    Args:
        rows: tokens.
        slots: heads of the whole batch.
        width: padded width of a head; sums [width, width] are loaded or stored per chunk.
        block: tokens at a time.
        capability: 0 is the interpreter.
    """
    least = 8 * width if capability else 2 * block
    chunks = max(1, min(-(-rows // least), -(-PROGRAMS // slots)))
    return -(-rows // (chunks * block)) * block


def compilations(capability: int) -> Iterator[Compilation]:
    """Every specialisation that a launch on ordinary tensors can choose on a chip.

    Args:
        capability: compute capability as 80, 90 or 100.
    """
    dtypes = (("fp32", 32), ("fp16", 16), ("bf16", 16))
    for kernel, width, (dtype, bits) in product(_KERNELS, (32, 64, MAX_HEAD_DIM), dtypes):
        for pattern, tangents in PATTERNS.get(kernel.__name__, {"": {}}).items():
            constexprs: dict[str, Any] = configuration(kernel.__name__, capability, width, bits)
            num_warps, num_stages = constexprs.pop("num_warps"), constexprs.pop("num_stages")
            constexprs |= tangents | {"UPCAST": False}
            arguments = [name for name in kernel.arg_names if name not in constexprs]
            yield Compilation(
                kernel=kernel,
                label=f"{pattern}{', ' if pattern else ''}head_dim {width}, {dtype}",
                signature={name: _triton_type(name, dtype) for name in arguments},
                constexprs=constexprs,
                num_warps=num_warps,
                num_stages=num_stages,
                divisible=tuple(n for n in arguments if n.endswith(("_stride", "_dim"))),
                matrix_product=bits == 16,
            )


def _triton_type(argument: str, dtype: str) -> str:
    if argument.endswith("_ptr"):
        return "*fp32" if "sums" in argument else f"*{dtype}"
    return "fp32" if argument == "eps" else "i32"
