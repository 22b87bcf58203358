"""What ahead-of-time compilation is given of a kernel."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Compilation:
    """One specialisation of a Triton kernel that dispatch can choose on a chip.

    Attributes:
        kernel: the `triton.jit` function.
        label: what is special about it: `head_dim 64, bfloat16, masked`.
        signature: argument -> Triton type (`*bf16`, `i32`, `fp32`), in the kernel's order and
            without its constexprs.
        constexprs: argument -> value.
        num_warps: warps of a program.
        num_stages: depth of the software pipeline.
        divisible: arguments that are multiples of 16 in a launch on ordinary tensors; pointers are
            taken to be aligned.
        matrix_product: whether it multiplies matrices in 16 bits, and so must use the matrix unit.
    """

    kernel: Any
    label: str
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = field(default=())
    matrix_product: bool
