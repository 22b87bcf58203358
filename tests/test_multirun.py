"""Sweeps: a failed job leaves the others running, and only what is missing runs again."""

import json
from pathlib import Path

from commands import TINY, run_here
from filelock import FileLock

from stillhouse.tracking.ledger import read_ledger


def test_one_failure_leaves_the_others_and_is_run_again_alone(capfd, here: Path) -> None:
    # Job 1 fails: a file lies where its artifacts belong.
    sweep = ("-m", "experiment=sft", "seed=0,1,2", "hydra.sweep.dir=sweep")
    blocked = here / "sweep" / "1" / "stages"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    done = run_here(capfd, *TINY, *sweep)
    assert done.code == 2
    status = {
        number: json.loads((here / "sweep" / number / "results.json").read_text())["status"]
        for number in "012"
    }
    assert status == {"0": "done", "1": "failed", "2": "done"}
    assert "error: of 3 jobs 1 failed:\n  job 1 (seed=1): " in done.err

    blocked.unlink()
    before = {n: (here / "sweep" / n / "results.json").stat().st_mtime_ns for n in "02"}
    again = run_here(capfd, *TINY, *sweep)
    assert again.code == 0, again.err
    assert again.out.count("train: step") == 1, "finished jobs ran again"
    assert before == {n: (here / "sweep" / n / "results.json").stat().st_mtime_ns for n in "02"}
    results = [json.loads((here / "sweep" / n / "results.json").read_text()) for n in "012"]
    assert {r["status"] for r in results} == {"done"}
    assert len({r["config_hash"] for r in results}) == 1, "the hash must not hold the seed"
    assert len({r["models"]["student"]["test_nll"] for r in results}) == 3


def test_an_old_sweep_with_another_config_is_refused(capfd, here: Path) -> None:
    sweep = ("-m", "experiment=sft", "seed=0,1", "hydra.sweep.dir=sweep")
    assert run_here(capfd, *TINY, *sweep).code == 0
    done = run_here(capfd, *TINY, *sweep, "optimizer.learning_rate=0.5")
    assert done.code == 2
    assert "optimizer.learning_rate: 0.004 -> 0.5" in done.err


def test_a_job_of_another_process_is_left_to_it(capfd, here: Path) -> None:
    """A cluster's jobs outlive the command that gave them to it; the next command meets them."""
    sweep = ("-m", "experiment=sft", "seed=0,1", "hydra.sweep.dir=sweep", "stop_after=tokenizer")
    assert run_here(capfd, *TINY, *sweep).code == 0
    before = read_ledger(here / "sweep")[1].job
    with FileLock(here / "sweep" / "1" / ".lock"):
        done = run_here(capfd, *TINY, *sweep)
        assert [e.state for e in read_ledger(here / "sweep")] == ["done", "running"]
    assert done.code == 2
    assert "job 1: another process works on it" in done.out
    assert "error: of 2 jobs 1 running:\n  job 1 (seed=1): running\n" in done.err
    assert read_ledger(here / "sweep")[1].job == before
