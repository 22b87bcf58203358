"""What a report of ahead-of-time compilation calls an offence, and the tables it goes into."""

from dataclasses import replace
from typing import Any

import pytest

from stillhouse_kernels import aot
from stillhouse_kernels.aot import Report
from stillhouse_kernels.machine_code import MachineCode

CODE = MachineCode(
    registers=128,
    spill_stores=0,
    spill_loads=0,
    stack=0,
    shared_memory=163 * 1024,
    tensor_memory=0,
    matrix_instructions={"HGMMA": 8},
    operands=("bf16",),
    scalar_products=0,
)
REPORT = Report(
    op="attention",
    kernel="forward",
    label="head_dim 64",
    num_warps=4,
    num_stages=2,
    matrix_product=True,
    chip=90,
    code=CODE,
    failure=None,
    seconds=1.25,
)


@pytest.mark.parametrize(("chip", "kib"), [(80, 163), (90, 227), (100, 227)])
def test_shared_memory_is_bounded_by_the_chip(chip: int, kib: int) -> None:
    full, over = (
        replace(REPORT, chip=chip, code=replace(CODE, shared_memory=1024 * kib + extra))
        for extra in (0, 1024)
    )
    assert full.offences == ()
    assert over.offences == (f"shared memory {kib + 1}.0 KiB, the chip has {kib}",)


@pytest.mark.parametrize(
    ("changes", "offence"),
    [
        ({"spill_loads": 1}, "spills: 0 STL, 1 LDL"),
        ({"spill_stores": 1}, "spills: 1 STL, 0 LDL"),
        ({"tensor_memory": 513}, "513 tensor columns, the chip has 512"),
        ({"operands": ("e5m2",)}, "no 16-bit matrix instruction"),
        ({"operands": ("bf16", "tf32")}, "multiplies float32 in tf32"),
        ({"matrix_instructions": {}}, "no 16-bit matrix instruction"),
        ({"scalar_products": 2}, "2 tl.dot outside the matrix unit"),
    ],
)
def test_an_offence_in_words(changes: dict[str, Any], offence: str) -> None:
    assert replace(REPORT, code=replace(CODE, **changes)).offences == (offence,)


def test_a_kernel_without_16_bit_products_needs_no_matrix_unit() -> None:
    code = replace(CODE, matrix_instructions={}, operands=(), scalar_products=2)
    assert replace(REPORT, matrix_product=False, code=code).offences == ()


def test_float32_is_not_multiplied_in_tf32() -> None:
    code = replace(CODE, matrix_instructions={"UTCHMMA": 8}, operands=("tf32",))
    report = replace(REPORT, matrix_product=False, code=code)
    assert report.offences == ("multiplies float32 in tf32",)


def test_the_table() -> None:
    broken = replace(REPORT, chip=100, code=None, failure="ValueError: no", seconds=None)
    mixed = replace(REPORT, code=replace(CODE, scalar_products=1, spill_loads=2))
    columns = ["operation  kernel   configuration  chip    warps  stages  registers"]
    columns += ["spills        stack B  shared KiB  tensor columns  matrix instructions"]
    columns += ["       seconds"]
    name = "attention  forward  head_dim 64    "
    assert aot.table([REPORT, mixed, broken]).splitlines() == [
        "  ".join(columns[:2]) + columns[2],
        f"{name}sm_90   4      2       128        0             0        163.0       0"
        "               8 HGMMA (bf16)            1.2",
        f"{name}sm_90   4      2       128        0 STL, 2 LDL  0        163.0       0"
        "               8 HGMMA (bf16) 1 outside  1.2",
        f"{name}sm_100  4      2       -          -             -        -           -"
        "               does not compile          cached",
    ]


def test_the_summary() -> None:
    code = replace(CODE, registers=255, shared_memory=1024, spill_loads=2, matrix_instructions={})
    other = replace(REPORT, label="head_dim 128", code=code)
    broken = replace(REPORT, chip=100, code=None, failure="ValueError: no")
    assert aot.summary([REPORT, broken, other], markdown=True).splitlines()[2:] == [
        "| attention | forward | sm_90  | 2              | 255       | 1        | 163 of 227 "
        "| HGMMA               |",
        "| attention | forward | sm_100 | 1              | 0         | 0        | 0 of 227   "
        "| -                   |",
    ]
