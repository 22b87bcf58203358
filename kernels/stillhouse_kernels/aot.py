"""Compile every kernel configuration that dispatch can choose, without a GPU, and read it back.

`python -m stillhouse_kernels.aot` compiles for sm_80, sm_90 and sm_100 as a launch would and prints
one row a configuration, with `--summary` one a kernel and chip; `--pairs` takes about half of them,
in which any two choices of a kernel meet. The exit code is 1 where one spills, needs more memory
than a block of that chip may have, multiplies outside the matrix unit or in tf32, or does not
compile. What is read back, and where, `machine_code` says. A time is that of this run; what
Triton's cache held has none (TRITON_ALWAYS_COMPILE=1 compiles all).
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from stillhouse_kernels import machine_code
from stillhouse_kernels.compilation import Compilation
from stillhouse_kernels.dispatch import interpreted, triton_installed
from stillhouse_kernels.machine_code import MachineCode

# Capability -> KiB of a block: CUDA C++ Programming Guide, "Compute Capabilities", technical
# specifications, "Maximum amount of shared memory per thread block".
SHARED_MEMORY_LIMITS = {80: 163, 90: 227, 100: 227}
TENSOR_MEMORY_LIMIT = 512  # columns of a block on sm_100: PTX ISA, "Tensor Memory"


@dataclass(frozen=True, kw_only=True)
class Report:
    """One configuration on one chip.

    Attributes:
        op: the folder of the operation, or the dotted module that was named.
        kernel: name of the `triton.jit` function; the next four are as in `Compilation`.
        chip: compute capability.
        code: None where it does not compile.
        failure: the compiler's words where it does not.
        seconds: to compile; None where Triton's cache held the result.
    """

    op: str
    kernel: str
    label: str
    num_warps: int
    num_stages: int
    matrix_product: bool
    chip: int
    code: MachineCode | None
    failure: str | None
    seconds: float | None

    @property
    def offences(self) -> tuple[str, ...]:
        """What keeps this configuration from being chosen, in words; empty where nothing does."""
        code = self.code
        if code is None:
            return (f"does not compile: {self.failure}",)
        found = []
        if code.spills:
            found.append(f"spills: {code.spills}")
        kib, limit = code.shared_memory / 1024, SHARED_MEMORY_LIMITS[self.chip]
        if kib > limit:
            found.append(f"shared memory {kib:.1f} KiB, the chip has {limit}")
        if code.tensor_memory > TENSOR_MEMORY_LIMIT:
            found.append(f"{code.tensor_memory} tensor columns, the chip has {TENSOR_MEMORY_LIMIT}")
        sixteen_bit = {"f16", "bf16"}.intersection(code.operands)
        if self.matrix_product and not (code.matrix_instructions and sixteen_bit):
            found.append("no 16-bit matrix instruction")
        elif self.matrix_product and code.scalar_products:
            found.append(f"{code.scalar_products} tl.dot outside the matrix unit")
        if "tf32" in code.operands:  # Triton 3.7 can take it for "ieee", beside a mask of bytes
            found.append("multiplies float32 in tf32")
        return tuple(found)

    def __str__(self) -> str:
        return _name(self.op, self.kernel, self.label, self.chip)


def _name(op: str, kernel: str, label: str, chip: int) -> str:
    return f"{op} {kernel} [{label}] sm_{chip}"


def operations() -> tuple[str, ...]:
    """Return the names of the package's operations that have a Triton kernel."""
    return tuple(sorted(path.parent.name for path in Path(__file__).parent.glob("*/kernel.py")))


def compile_all(
    *,
    chips: Sequence[int] = tuple(SHARED_MEMORY_LIMITS),
    ops: Sequence[str] | None = None,
    match: str = "",
    pairs: bool = False,
    jobs: int | None = None,
) -> list[Report]:
    """Compile the kernel configurations of operations for chips and read the machine code back.

    Args:
        chips: compute capabilities.
        ops: names of operations, or dotted modules with a `compilations`; None for all.
        match: text that occurs in the operation, kernel and label, as `str(report)` writes them.
        pairs: leave out configurations whose every two choices meet in others: a dtype and a head
            dimension, a tile and a mask. What matches is taken of the rest.
        jobs: processes; None for one a CPU. With 1 no other process is started.

    Returns:
        The reports by operation, then chip, in the order of `compilations`.

    Raises:
        ValueError: for an unknown chip or operation, no process, no configuration that matches,
            and where triton is missing or interprets its kernels.
        BrokenProcessPool: where the compiler crashes.
    """
    ops = operations() if ops is None else ops
    _check(chips, ops, jobs)
    tasks = [
        (op, chip, index)
        for op in ops
        for chip in chips
        for index, it in _wanted(op, chip, pairs=pairs)
        if match in _name(op, it.kernel.__name__, it.label, chip)
    ]
    if not tasks:
        raise ValueError(
            f"ops {', '.join(ops) or 'none'}; chips {', '.join(map(str, chips))}: no configuration "
            f"has {match!r} in its name, such as {_name('op', 'kernel', 'label', 80)!r}"
        )
    # Longest first: sm_100 takes many times as long as sm_80.
    order = sorted(tasks, key=lambda task: -task[1])
    reports = dict(zip(order, _run(order, jobs), strict=True))
    return [reports[task] for task in tasks]


def _check(chips: Sequence[int], ops: Sequence[str], jobs: int | None) -> None:
    if interpreted():
        raise ValueError(
            "TRITON_INTERPRET=1: Triton's interpreter and its compiler cannot share a process; "
            "unset it before Python starts"
        )
    if not triton_installed():
        raise ValueError(
            "triton is not installed, and it is what compiles; pip install -e '.[kernels]'"
        )
    for chip in chips:
        if chip not in SHARED_MEMORY_LIMITS:
            known = ", ".join(map(str, SHARED_MEMORY_LIMITS))
            raise ValueError(f"chips: {chip}: expected compute capabilities, some of {known}")
    for op in ops:
        if not hasattr(_module(op), "compilations"):
            raise ValueError(
                f"ops: {op!r}: expected some of {', '.join(operations()) or '(none)'}, or a "
                "dotted module that has a `compilations(capability)`"
            )
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs={jobs}: expected at least 1 process")


def _module(op: str) -> Any:
    """The module of an operation; None where there is none of that name."""
    name = op if "." in op else f"stillhouse_kernels.{op}.kernel"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # it is there, and imports something that is not
        return None


@cache
def _compilations(op: str, chip: int) -> tuple[Compilation, ...]:
    return tuple(_module(op).compilations(chip))


def _wanted(op: str, chip: int, *, pairs: bool) -> list[tuple[int, Compilation]]:
    every = _compilations(op, chip)
    return [(i, every[i]) for i in (_pairwise(every) if pairs else range(len(every)))]


def _pairwise(compilations: Sequence[Compilation]) -> list[int]:
    """Indices of some in which any two properties of a kernel meet that meet in one of all.

    Always the next is the one with most pairs that none has yet; of several the last, for large
    tiles and masks are listed last.
    """
    pairs = [_pairs(it) for it in compilations]
    left = set[Any]().union(*pairs)
    chosen: list[int] = []
    while left:
        best = max(range(len(pairs)), key=lambda i: (len(pairs[i] & left), i))
        left -= pairs[best]
        chosen.append(best)
    return sorted(chosen)


def _pairs(it: Compilation) -> set[Any]:
    typed = {name: (kind, name in it.divisible) for name, kind in it.signature.items()}
    launch = {"num_warps": it.num_warps, "num_stages": it.num_stages}
    properties = sorted({**typed, **it.constexprs, **launch}.items(), key=lambda item: item[0])
    return {(it.kernel.__name__, *two) for two in combinations(properties, 2)}


Task = tuple[str, int, int]  # operation, chip, index in `_compilations`: a kernel does not pickle


def _run(tasks: Sequence[Task], jobs: int | None) -> Iterator[Report]:
    processes = min(jobs or len(os.sched_getaffinity(0)), len(tasks))
    if processes == 1:
        yield from map(_compile, tasks)
        return
    # Spawned, not forked: torch has threads.
    pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
    try:
        yield from pool.map(_compile, tasks)
    except BrokenProcessPool as error:
        error.add_note("The compiler crashed; --jobs 1 and --match find the kernel.")
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _source(compilation: Compilation) -> Any:
    """What Triton compiles, with the hints that a launch on ordinary tensors would give."""
    from triton.compiler import ASTSource

    signature = {**compilation.signature, **dict.fromkeys(compilation.constexprs, "constexpr")}
    names = compilation.kernel.arg_names
    if wrong := set(names).symmetric_difference([*signature, *compilation.divisible]):
        raise ValueError(f"signature and constexprs do not fit the arguments: {sorted(wrong)}")
    aligned = {name for name, kind in compilation.signature.items() if kind.startswith("*")}
    aligned.update(compilation.divisible)
    return ASTSource(
        compilation.kernel,
        signature=signature,
        constexprs=dict(compilation.constexprs),
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in sorted(aligned)},
    )


def _compile(task: Task) -> Report:
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    op, chip, index = task
    compilation = _compilations(op, chip)[index]
    options = {"num_warps": compilation.num_warps, "num_stages": compilation.num_stages}
    code, failure, told = None, None, {}
    start = time.perf_counter()
    try:
        # Where ptxas fails, Triton prints the whole PTX.
        with knobs.compilation.scope(), contextlib.redirect_stdout(io.StringIO()):
            knobs.compilation.listener = lambda **what: told.update(what)
            target = GPUTarget("cuda", chip, 32)
            compiled = triton.compile(_source(compilation), target=target, options=options)
        code = machine_code.read(compiled)
    except Exception as error:  # whatever a compiler raises is a line in the report
        failure = _words(error)
    return Report(
        op=op,
        kernel=compilation.kernel.__name__,
        label=compilation.label,
        num_warps=compilation.num_warps,
        num_stages=compilation.num_stages,
        matrix_product=compilation.matrix_product,
        chip=chip,
        code=code,
        failure=failure,
        seconds=None if told.get("cache_hit") else round(time.perf_counter() - start, 2),
    )


def _words(error: BaseException) -> str:
    """The innermost cause in one line; Triton's own message without the source it quotes."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = (getattr(error, "error_message", None) or str(error)).partition("Repro command")[0]
    return f"{type(error).__name__}: {' '.join(text.split())}"[:300]


def _row(report: Report) -> list[str]:
    code = report.code
    resources = ["-"] * 5 + ["does not compile"]
    if code is not None:
        products = [f"{n} {mnemonic}" for mnemonic, n in code.matrix_instructions.items()]
        products += [f"({', '.join(code.operands)})"] if code.operands else []
        products += [f"{code.scalar_products} outside"] if code.scalar_products else []
        resources = [str(code.registers), code.spills or "0", str(code.stack)]
        resources += [f"{code.shared_memory / 1024:.1f}", str(code.tensor_memory)]
        resources += [" ".join(products) or "-"]
    return [
        *(report.op, report.kernel, report.label, f"sm_{report.chip}"),
        *(str(report.num_warps), str(report.num_stages), *resources),
        "cached" if report.seconds is None else f"{report.seconds:.1f}",
    ]


def table(reports: Sequence[Report], *, markdown: bool = False) -> str:
    """Return the reports as lines of aligned text, or as a markdown table."""
    head = "operation,kernel,configuration,chip,warps,stages,registers,spills,stack B,shared KiB"
    head += ",tensor columns,matrix instructions,seconds"
    return _aligned([head.split(","), *map(_row, reports)], markdown)


def summary(reports: Sequence[Report], *, markdown: bool = False) -> str:
    """Return one row a kernel and chip: the most that any of its configurations takes."""
    head = "operation,kernel,chip,configurations,registers,spilling,shared KiB,matrix instructions"
    rows: list[list[str]] = [[*head.split(",")]]
    for op, kernel, chip in dict.fromkeys((it.op, it.kernel, it.chip) for it in reports):
        of_this = [it for it in reports if (it.op, it.kernel, it.chip) == (op, kernel, chip)]
        codes = [it.code for it in of_this if it.code is not None]
        shared = max((code.shared_memory for code in codes), default=0) / 1024
        products = sorted({name for code in codes for name in code.matrix_instructions})
        rows.append(
            [
                *(op, kernel, f"sm_{chip}", str(len(of_this))),
                str(max((code.registers for code in codes), default=0)),
                str(sum(bool(code.spills) for code in codes)),
                f"{shared:.0f} of {SHARED_MEMORY_LIMITS[chip]}",
                ", ".join(products) or "-",
            ]
        )
    return _aligned(rows, markdown)


def _aligned(rows: Sequence[Sequence[str]], markdown: bool) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in lines)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m stillhouse_kernels.aot",
        description="Compile every kernel configuration that dispatch can choose, without a GPU.",
    )
    known = ", ".join(operations())
    parser.add_argument("--chips", nargs="+", type=int, default=list(SHARED_MEMORY_LIMITS))
    parser.add_argument("--ops", nargs="+", help=f"some of {known}; default: all")
    parser.add_argument("--match", default="", help="only what has this text in its name")
    parser.add_argument("--pairs", action="store_true", help="half, where any two choices meet")
    parser.add_argument("--jobs", type=int, help="processes; default: the CPUs")
    parser.add_argument("--json", type=Path, help="write the reports to this file")
    parser.add_argument("--summary", action="store_true", help="one row a kernel and chip")
    parser.add_argument("--markdown", action="store_true", help="print a markdown table")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 in bounds, 1 an offender, 2 bad input."""
    options = _parser().parse_args(argv)
    try:
        if options.json is not None and not options.json.absolute().parent.is_dir():
            raise ValueError(f"--json {options.json}: there is no folder {options.json.parent}")
        reports = compile_all(
            chips=options.chips,
            ops=options.ops,
            match=options.match,
            pairs=options.pairs,
            jobs=options.jobs,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json is not None:
        rows = [{**asdict(report), "offences": report.offences} for report in reports]
        partial = options.json.with_name(f"{options.json.name}.partial")
        partial.write_text(json.dumps(rows, indent=1))
        partial.replace(options.json)
    show = summary if options.summary else table
    print(show(reports, markdown=options.markdown))
    offenders = [f"{it}: {'; '.join(it.offences)}\n" for it in reports if it.offences]
    sys.stderr.writelines(offenders)
    return int(bool(offenders))


if __name__ == "__main__":
    sys.exit(main())
