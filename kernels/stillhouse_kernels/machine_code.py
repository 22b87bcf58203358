"""What a compiled kernel takes of the chip, read in its machine code.

Spills are instructions that store to (STL) or load from (LDL) local memory: a register count can
look healthy where a loop spills. The matrix instruction is what the disassembly shows:

| chip   | instruction   | PTX                                                                     |
|--------|---------------|-------------------------------------------------------------------------|
| sm_80  | HMMA          | `mma.sync`                                                              |
| sm_90  | HGMMA, HMMA   | `wgmma`; `mma.sync` with fewer than 64 rows in a tile or four warps     |
| sm_100 | UTCHMMA, HMMA | `tcgen05.mma` on tensor memory; `mma.sync` as on sm_90                  |

UTCHMMA does not tell float16 from tf32, so the type of the operands is read in the PTX.
"""

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z]\w*)")
# `mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32`, `tcgen05.mma.cta_group::1.kind::f16`
_OPERANDS = re.compile(r"\b(?:wg)?mma\.\S*?(?:\.(\w+)\.\1\b|kind::(\w+))")
# A product that no pass moved to a matrix layout is lowered to scalar multiplications.
_SCALAR_PRODUCT = re.compile(r"\btt\.dot\b.*-> tensor<[^>]*#blocked\d*>")


@dataclass(frozen=True, kw_only=True)
class MachineCode:
    """What the compiled kernel takes of the chip.

    Attributes:
        registers: of a thread, as `cuobjdump --dump-resource-usage` says.
        spill_stores, spill_loads: STL and LDL instructions.
        stack: bytes of a thread, from the same source as the registers.
        shared_memory: bytes of a block.
        tensor_memory: columns of a block; 0 before sm_100.
        matrix_instructions: SASS mnemonic -> how many.
        operands: their types, as PTX spells them; `f16` is either 16-bit type on sm_100.
        scalar_products: `tl.dot`s that run outside the matrix unit.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    shared_memory: int
    tensor_memory: int
    matrix_instructions: Mapping[str, int]
    operands: tuple[str, ...]
    scalar_products: int

    @property
    def spills(self) -> str:
        """How many, in words; empty where there is none."""
        some = self.spill_stores or self.spill_loads
        return f"{self.spill_stores} STL, {self.spill_loads} LDL" if some else ""


def read(compiled: Any) -> MachineCode:
    """Disassemble what `triton.compile` returned."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [knobs.nvidia.cuobjdump.path, "-sass", "--dump-resource-usage", cubin.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    instructions = Counter(_INSTRUCTION.findall(text))
    if not instructions:
        raise RuntimeError("cuobjdump shows no instruction of the compiled kernel")
    return MachineCode(
        registers=max(int(n) for n in re.findall(r"\bREG:(\d+)", text)),
        spill_stores=instructions["STL"],
        spill_loads=instructions["LDL"],
        stack=max(int(n) for n in re.findall(r"\bSTACK:(\d+)", text)),
        shared_memory=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        matrix_instructions={k: n for k, n in sorted(instructions.items()) if k.endswith("MMA")},
        operands=tuple(sorted({a or b for a, b in _OPERANDS.findall(compiled.asm["ptx"])})),
        scalar_products=len(_SCALAR_PRODUCT.findall(compiled.asm["ttgir"])),
    )
