"""Ahead-of-time compilation: what it reads in the machine code, what it calls an offence."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from stillhouse_kernels import aot, machine_code
from stillhouse_kernels.compilation import Compilation

KERNELS = Path(__file__).parents[2] / "kernels"

TOY_KERNELS = """
import triton
import triton.language as tl

from stillhouse_kernels.compilation import Compilation


@triton.jit
def product(a, b, c, n, K, M: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr):
    i, k = tl.arange(0, M), tl.arange(0, BK)
    sums = tl.zeros((M, M), tl.float32)
    for start in range(0, K, BK):
        left = tl.load(a + i[:, None] * n + k[None] + start)
        right = tl.load(b + (k[:, None] + start) * n + i[None])
        sums = tl.dot(left, right, sums, input_precision=PRECISION)
    tl.store(c + i[:, None] * n + i[None], sums)


@triton.jit
def copy(a, c, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(c + i, tl.load(a + i))


@triton.jit
def of_missing(x):
    return x + missing


@triton.jit
def faulty(a):
    tl.store(a, of_missing(1.0))


@triton.jit
def unassembled(a):
    x = tl.load(a)
    y = tl.inline_asm_elementwise("distil $0, $1;", "=f,f", [x], tl.float32, True, 1)
    tl.store(a, y)


def of_product(label, M, BK, warps=1, stages=3, kind="*bf16", precision="tf32", divisible=("n",)):
    return Compilation(
        kernel=product,
        label=label,
        signature={"a": kind, "b": kind, "c": "*fp32", "n": "i32", "K": "i32"},
        constexprs={"M": M, "BK": BK, "PRECISION": precision},
        num_warps=warps,
        num_stages=stages,
        divisible=divisible,
        matrix_product=True,
    )


def of_pointers(kernel, label, *names, matrix_product=False, **constexprs):
    return Compilation(
        kernel=kernel,
        label=label,
        signature=dict.fromkeys(names, "*fp32"),
        constexprs=constexprs,
        num_warps=1,
        num_stages=1,
        matrix_product=matrix_product,
    )


def compilations(capability):
    yield of_product("sound", 16, 16)
    yield of_product("any stride", 16, 16, divisible=())
    yield of_product("spilling", 128, 16, warps=2)
    yield of_product("large", 128, 128, warps=8, stages=4)
    yield of_product("tf32", 16, 16, kind="*fp32")
    yield of_product("float32", 16, 16, kind="*fp32", precision="ieee")
    yield of_pointers(copy, "no product", "a", "c", matrix_product=True, N=32)
    yield of_pointers(copy, "float32", "a", "c", N=64)
    yield of_pointers(faulty, "faulty", "a")
    yield of_pointers(unassembled, "faulty", "a")
    yield of_pointers(copy, "incomplete", "a", "d", N=32)
"""

COMMANDS = """
import contextlib, io, json, sys
from stillhouse_kernels import aot

def told(argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = aot.main(argv)
    return [code, out.getvalue(), err.getvalue()]

if __name__ == "__main__":
    print(json.dumps({name: told(argv) for name, argv in json.loads(sys.argv[1]).items()}))
"""

TOYS = ["--ops", "toys.kernel", "--chips", "80", "--jobs", "1"]


def run(folder: Path, wanted: dict[str, list[str]]) -> dict[str, Any]:
    """Command -> (exit code, stdout, stderr), all of one process that stands in `folder`."""
    (folder / "toys").mkdir()
    (folder / "toys/kernel.py").write_text(TOY_KERNELS)
    (folder / "commands.py").write_text(COMMANDS)
    env = {**os.environ, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(KERNELS)}
    env.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "commands.py", json.dumps(wanted)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The commands of `run`; `reports` is what the first wrote, `left` the files that remain."""
    folder = tmp_path_factory.mktemp("toys")
    wanted = {
        "all": [*TOYS, "--json", "reports.json"],
        "again": [*TOYS, "--match", "product [sound]", "--markdown"],
        "no such op": ["--ops", "toys.kernel", "attention"],
        "no kernels": ["--ops", "os.path"],
        "chip": [*TOYS[:2], "--chips", "80", "70"],
        "jobs": [*TOYS[:-1], "0"],
        "match": [*TOYS, "--match", "head_dim 64"],
        "json": [*TOYS, "--json", "nowhere/reports.json"],
    }
    told = run(folder, wanted)
    reports = json.loads((folder / "reports.json").read_text())
    by_name = {f"{r['kernel']} {r['label']}": r for r in reports}
    return {**told, "reports": by_name, "left": sorted(os.listdir(folder))}


def test_offenders_are_told_in_a_line_each(commands: dict[str, Any]) -> None:
    code, out, err = commands["all"]
    assert code == 1
    assert len(out.splitlines()) == 1 + len(commands["reports"])
    # ptxas names the file that it read.
    err = re.sub(r"\S+\.ptx, line \d+", "FILE", err)
    spilling = commands["reports"]["product spilling"]["code"]
    assert err.splitlines() == [
        "toys.kernel product [spilling] sm_80: spills: "
        f"{spilling['spill_stores']} STL, {spilling['spill_loads']} LDL",
        "toys.kernel product [large] sm_80: shared memory 192.0 KiB, the chip has 163",
        "toys.kernel product [tf32] sm_80: no 16-bit matrix instruction; "
        "multiplies float32 in tf32",
        "toys.kernel product [float32] sm_80: no 16-bit matrix instruction",
        "toys.kernel copy [no product] sm_80: no 16-bit matrix instruction",
        "toys.kernel faulty [faulty] sm_80: does not compile: CompilationError: "
        "NameError('missing is not defined')",
        "toys.kernel unassembled [faulty] sm_80: does not compile: PTXASError: Internal Triton PTX "
        "codegen error `ptxas` stderr: ptxas FILE; error : Not a name of any known instruction: "
        "'distil' ptxas fatal : Ptx assembly aborted due to errors",
        "toys.kernel copy [incomplete] sm_80: does not compile: ValueError: signature and "
        "constexprs do not fit the arguments: ['c', 'd']",
    ]


def test_what_is_read_of_a_sound_kernel(commands: dict[str, Any]) -> None:
    code = commands["reports"]["product sound"]["code"]
    assert 16 <= code.pop("registers") <= 128
    assert code == {
        "spill_stores": 0,
        "spill_loads": 0,
        "stack": 0,
        "shared_memory": 2 * 2 * 16 * 16 * 2,  # two operands, two buffers, bytes of a bfloat16
        "tensor_memory": 0,
        "matrix_instructions": {"HMMA": 2},  # m16n8k16 twice
        "operands": ["bf16"],
        "scalar_products": 0,
    }


def test_spills_are_instructions_of_the_machine_code(commands: dict[str, Any]) -> None:
    code = commands["reports"]["product spilling"]["code"]
    assert min(code["spill_stores"], code["spill_loads"], code["stack"]) > 0
    assert code["registers"] == 255


def test_an_operation_that_cannot_be_imported_is_not_called_unknown(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "needy_operation").mkdir()
    (tmp_path / "needy_operation/kernel.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ModuleNotFoundError) as e:
        aot.compile_all(ops=["needy_operation.kernel"])
    assert str(e.value) == "No module named 'no_such_dependency'"


def test_any_two_choices_meet_in_pairs() -> None:
    def compilation(kernel: str, head_dim: int, kind: str, masked: bool) -> Compilation:
        return Compilation(
            kernel=SimpleNamespace(__name__=kernel),
            label="",
            signature={"x_ptr": kind},
            constexprs={"HEAD_DIM": head_dim, "MASKED": masked},
            num_warps=4,
            num_stages=2,
            matrix_product=False,
        )

    choices = ("forward", "backward"), (64, 128, 256), ("*fp32", "*bf16"), (False, True)
    every = list(product(*choices))
    kept = [every[index] for index in aot._pairwise([compilation(*it) for it in every])]
    # The pairs of 3 with 2 that each kernel needs fit into 6 of its 12.
    assert Counter(kernel for kernel, *_ in kept) == {"forward": 6, "backward": 6}
    for i, j in combinations((1, 2, 3), 2):
        meeting = {(it[0], it[i], it[j]) for it in kept}
        assert meeting == set(product(choices[0], choices[i], choices[j]))
    assert every[-1] in kept, "of the same pairs, the largest"


@pytest.mark.parametrize("predicate", ["", "@P0 ", "@!P1 ", "@!UP2 "])
def test_a_predicate_hides_no_instruction(predicate: str) -> None:
    sass = (
        f"        /*1f0c0*/             {predicate}STL.64 [R1+0x8], R4 ;   /* 0x00000804ff007387 */"
    )
    assert machine_code._INSTRUCTION.findall(sass) == ["STL"]


def test_operands_tell_tf32_from_16_bits(commands: dict[str, Any]) -> None:
    tf32, float32 = (commands["reports"][f"product {name}"]["code"] for name in ("tf32", "float32"))
    assert (tf32["operands"], list(tf32["matrix_instructions"])) == (["tf32"], ["HMMA"])
    assert (float32["operands"], float32["matrix_instructions"]) == ([], {})
    assert float32["scalar_products"] == 1


def test_arguments_get_the_hint_that_a_launch_gives(commands: dict[str, Any]) -> None:
    sound, any_stride = (
        commands["reports"][f"product {label}"]["code"] for label in ("sound", "any stride")
    )
    # Unaligned rows cannot be copied asynchronously, so nothing is buffered ahead.
    assert any_stride["shared_memory"] < sound["shared_memory"]


def test_seconds_are_those_of_this_run(commands: dict[str, Any]) -> None:
    assert all(r["seconds"] is not None for r in commands["reports"].values())
    code, out, err = commands["again"]
    assert (code, err) == (0, "")
    head, rule, row = out.splitlines()
    assert head.startswith("| operation   | kernel  | configuration | chip  | warps |")
    assert set(rule) == {"|", "-", " "}
    assert row.startswith("| toys.kernel | product | sound         | sm_80 | 1     |")
    assert row.endswith("| 2 HMMA (bf16)       | cached  |")


@pytest.mark.slow
def test_processes_keep_the_order(tmp_path: Path) -> None:
    argv = [*TOYS[:-1], "2", "--match", "[float32]"]
    code, out, err = run(tmp_path, {"two processes": argv})["two processes"]
    assert code == 1
    assert [line.split()[1] for line in out.splitlines()[1:]] == ["product", "copy"]
    assert err == "toys.kernel product [float32] sm_80: no 16-bit matrix instruction\n"


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("no such op", "ops: 'attention': expected some of {known}, {dotted}"),
        ("no kernels", "ops: 'os.path': expected some of {known}, {dotted}"),
        ("chip", "chips: 70: expected compute capabilities, some of 80, 90, 100"),
        ("jobs", "jobs=0: expected at least 1 process"),
        (
            "match",
            "ops toys.kernel; chips 80: no configuration has 'head_dim 64' in its name, such as "
            "'op kernel [label] sm_80'",
        ),
        ("json", "--json nowhere/reports.json: there is no folder nowhere"),
    ],
)
def test_bad_input_is_told_in_one_line(commands: dict[str, Any], command: str, line: str) -> None:
    known = ", ".join(aot.operations())
    dotted = "or a dotted module that has a `compilations(capability)`"
    line = line.format(known=known, dotted=dotted)
    assert commands[command] == [2, "", f"error: {line}\n"]


def test_nothing_half_written_is_left(commands: dict[str, Any]) -> None:
    known = {"cache", "commands.py", "reports.json", "toys"}
    assert set(commands["left"]) - {"__pycache__"} == known


def test_the_interpreter_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert aot.main([]) == 2
    assert capsys.readouterr() == (
        "",
        "error: TRITON_INTERPRET=1: Triton's interpreter and its compiler cannot share a process; "
        "unset it before Python starts\n",
    )


def test_a_machine_without_triton(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(aot, "triton_installed", lambda: False)
    assert aot.main([]) == 2
    assert capsys.readouterr() == (
        "",
        "error: triton is not installed, and it is what compiles; pip install -e '.[kernels]'\n",
    )


@pytest.mark.slow(minutes=3)
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_any_two_choices_stay_in_the_bounds_of_the_chip(chip: int, tmp_path: Path) -> None:
    file = tmp_path / "reports.json"
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "stillhouse_kernels.aot", "--pairs", "--chips", str(chip)]
    done = subprocess.run(
        [*command, "--json", str(file)],
        env={**env, "PYTHONPATH": str(KERNELS)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    reports = json.loads(file.read_text())
    assert {r["op"] for r in reports} == set(aot.operations())
    for report in reports:
        code = report["code"]
        assert (code["spill_stores"], code["spill_loads"]) == (0, 0), report
        assert code["shared_memory"] <= {80: 163, 90: 227, 100: 227}[chip] * 1024, report
        assert not report["matrix_product"] or code["matrix_instructions"], report
