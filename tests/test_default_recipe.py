"""The default recipe at its real size: minutes long, run by `pytest -m slow`."""

import json
from pathlib import Path

import pytest
from commands import only_run, run_process


@pytest.mark.slow(minutes=5)
def test_distillation_closes_a_quarter_of_the_gap(tmp_path: Path) -> None:
    done = run_process("tracking=csv", folder=tmp_path, cache=tmp_path / "cache", seconds=1500)
    assert done.code == 0, done.err
    results = json.loads((only_run(tmp_path / "outputs") / "results.json").read_text())
    nll = {role: numbers["test_nll"] for role, numbers in results["models"].items()}
    closed = (nll["student_alone"] - nll["student"]) / (nll["student_alone"] - nll["teacher"])
    assert closed >= 0.25
