"""The loss's kernels compiled for chips that are not here: no spills, little shared memory."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

CHIPS = (80, 90, 100)


def compiled(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """Reports of a process of its own: the interpreter and the compiler cannot share one."""
    where = tmp_path / "reports.json"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "stillhouse_kernels.aot", "--ops", "vocabulary_loss"]
    done = subprocess.run(
        [*command, "--json", str(where), *options], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(where.read_text())


def assert_lean(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        code = report["code"]
        assert (code["spill_stores"], code["spill_loads"]) == (0, 0), report
        assert code["shared_memory"] < 4096, report
        # Of 65,536 registers; four programs of 256 threads a multiprocessor hide the loads.
        assert code["registers"] <= 64, report


def test_largest_kernel_on_one_chip(tmp_path: Path) -> None:
    match = ("--match", "jsd, capped, G float32")
    reports = compiled(tmp_path, "--chips", "90", "--jobs", "1", *match)
    assert len(reports) == 2
    assert_lean(reports)


def test_every_choice_of_dispatch_is_listed() -> None:
    from stillhouse_kernels.vocabulary_loss import kernel

    for chip in CHIPS:
        listed = list(kernel.compilations(chip))
        assert len({(it.kernel.__name__, it.label) for it in listed}) == len(listed)
        # 6 divergences, capped or not, 3 dtypes of G, vocabularies odd or not.
        assert Counter(it.kernel.__name__ for it in listed) == {
            "dense_rows": 72,
            "tail_lse": 2,
            "spread_tail": 6,
        }
        block, num_warps = kernel.configuration(chip)
        for it in listed:
            assert it.constexprs["BLOCK"] == block
            assert it.num_warps == num_warps
            assert not it.matrix_product
