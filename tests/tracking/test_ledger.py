"""The ledger of a sweep: states, in the words of the job `jobs` and of a sweep that ends."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from commands import TINY, run_here, run_process, start_process
from filelock import FileLock
from omegaconf import OmegaConf

from stillhouse.tracking.ledger import Job, SweepLedger, read_ledger, taken, tell_unfinished


def results(folder: Path, status: str, *seconds: float) -> None:
    """Write the results of a run whose teacher lay in the cache."""
    folder.mkdir(parents=True)
    stages = {f"s{i}": {"status": "done", "seconds": s} for i, s in enumerate(seconds)}
    stages["teacher"] = {"status": "cached", "seconds": 60.0}
    (folder / "results.json").write_text(json.dumps({"status": status, "stages": stages}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """One job of each state; two of them have seed=1 besides."""
    keys = [["experiment=sft", f"seed={n}"] for n in range(5)]
    Job(0, keys[0], "0").write(tmp_path)
    results(tmp_path / "0", "done", 1.5, 2.0)
    Job(1, keys[1], "1").failed("stages.train: no space").write(tmp_path)
    results(tmp_path / "1", "failed")
    Job(2, keys[2], "2").write(tmp_path)
    results(tmp_path / "2", "running", 4.0)
    Job(3, keys[3], "3").write(tmp_path)
    results(tmp_path / "3", "running")
    Job(4, keys[4]).write(tmp_path)
    return tmp_path


def test_states(sweep: Path) -> None:
    with FileLock(sweep / "2" / ".lock"):
        entries = read_ledger(sweep)
        assert [e.state for e in entries] == ["done", "failed", "running", "killed", "waiting"]
    assert [e.seconds for e in entries] == [3.5, None, 4.0, None, None]
    assert read_ledger(sweep)[2].state == "killed"


def test_a_job_that_begins_again_has_not_failed(sweep: Path) -> None:
    Job(1, ["experiment=sft", "seed=1"], "1").write(sweep)
    assert read_ledger(sweep)[1].state == "killed"


def test_what_is_to_run_again_waits(sweep: Path) -> None:
    """It may wait long in the queue of a cluster, where an old reason would be no news of it."""
    task = ["experiment=sft", "seed=0,1,2,3,4,5"]
    hydra = {"sweep": {"dir": str(sweep)}, "overrides": {"task": task}}
    with FileLock(sweep / "2" / ".lock"):
        SweepLedger().on_multirun_start(OmegaConf.create({"hydra": hydra}))
        entries = read_ledger(sweep)
        assert [e.state for e in entries] == ["done", "waiting", "running", *["waiting"] * 3]
    assert [e.job.overrides for e in entries] == [["experiment=sft", f"seed={n}"] for n in range(6)]
    assert taken() == [sweep]


def test_what_a_sweep_tells_at_its_end(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tell_unfinished(sweep)
    assert capsys.readouterr().err == (
        "error: of 5 jobs 1 waiting, 1 failed, 2 killed:\n"
        "  job 1 (seed=1): stages.train: no space\n"
        "  job 2 (seed=2): killed\n"
        "  job 3 (seed=3): killed\n"
        "  job 4 (seed=4): waiting\n"
        f"run the same command with hydra.sweep.dir={sweep} to run only these again\n"
    )


def test_nothing_is_told_of_jobs_that_are_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Job(0, ["seed=0"], "0").write(tmp_path)
    results(tmp_path / "0", "done")
    assert not tell_unfinished(tmp_path)
    assert capsys.readouterr().err == ""
    assert taken() == []


def test_the_job_that_shows_it(capfd, sweep: Path) -> None:
    done = run_here(capfd, "--config-name", "jobs", f"sweep={sweep}")
    assert done.code == 0, done.err
    assert "stages.train: no space" in done.out
    assert done.out.endswith("1 done, 1 waiting, 1 failed, 2 killed\n")


def test_a_folder_without_a_ledger(capfd, tmp_path: Path) -> None:
    done = run_here(capfd, "--config-name", "jobs", f"sweep={tmp_path}")
    assert done.code == 2
    assert done.err == (
        f"error: sweep={tmp_path}: there is no ledger of jobs; expected the folder of a sweep, "
        "such as multirun/<time>\n"
    )


@pytest.mark.slow
def test_parallel_jobs_one_fails_one_is_killed_and_both_are_run_again(here: Path) -> None:
    """Two workers of joblib, three methods and two seeds; the teacher is trained once."""
    command = (
        *TINY,
        "-m",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
        "experiment=word_kd",
        "method.divergence=forward_kl,reverse_kl,jsd",
        "seed=0,1",
        "hydra.sweep.dir=sweep",
        "trainer.max_steps=40",
    )
    blocked = here / "sweep" / "1" / "stages"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    process = start_process(*command, folder=here, cache=here / "cache")
    victim = here / "sweep" / "2"
    deadline = time.monotonic() + 400
    wanted = random.randint(2, 20)
    while True:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        series = [p.read_text() for p in victim.glob("work/distil/metrics.csv")]
        if series and len(series[0].splitlines()) > wanted:
            break
        time.sleep(0.02)
    job = read_ledger(here / "sweep")[2].job
    os.kill(int(str(job.process).rpartition(":")[2]), signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 2, (out, err)
    assert "error: a worker of the launcher was killed from outside" in err
    states = [entry.state for entry in read_ledger(here / "sweep")]
    assert states[1] == "failed"
    assert states[2] == "killed"
    blocked.unlink()
    done = run_process(*command, folder=here, cache=here / "cache")
    assert done.code == 0, done.err
    assert {entry.state for entry in read_ledger(here / "sweep")} == {"done"}
    teachers = [p for p in (here / "cache").iterdir() if p.is_dir() and "teacher" in p.name]
    assert len(teachers) == 1
