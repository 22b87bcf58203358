"""The launchers of submitit: SLURM with a stand-in for its commands, and this machine."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import slurm_stub
import yaml
from commands import TINY, run_here, run_process, start_process
from hydra import compose, initialize_config_dir

from stillhouse import cli
from stillhouse.schema import register_schemas
from stillhouse.tracking.ledger import read_ledger

SWEEP = (*TINY, "-m", "experiment=sft", "seed=0,1,2", "hydra.sweep.dir=sweep")
LONG = ("trainer.max_steps=300", "callbacks.checkpoint.checkpoint_every_n_steps=5")


def states(here: Path) -> dict[int, str]:
    """Return number -> state of the jobs."""
    return {entry.job.number: entry.state for entry in read_ledger(here / "sweep")}


def wait_for_step(here: Path, job: int, wanted: int) -> int:
    """Wait for a job to come to a step; return the id of its process."""
    series = here / "sweep" / str(job) / "work" / "train" / "metrics.csv"
    deadline = time.monotonic() + 240
    while not series.exists() or len(series.read_text().splitlines()) < wanted:
        assert time.monotonic() < deadline, states(here)
        time.sleep(0.05)
    (process,) = (e.job.process for e in read_ledger(here / "sweep") if e.job.number == job)
    return int(str(process).rpartition(":")[2])


@pytest.mark.slow(minutes=1)
def test_slurm_runs_an_array_of_which_one_fails_and_one_is_queued_again(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM's signal before a job's time is over: it begins again, from its last checkpoint."""
    stub = slurm_stub.install(here / "slurm")
    monkeypatch.setenv("PATH", f"{stub}{os.pathsep}{os.environ['PATH']}")
    own = ("hydra.launcher.partition=small", "hydra.launcher.array_parallelism=2")
    command = (*SWEEP, *LONG, "hydra/launcher=slurm", *own)
    blocked = here / "sweep" / "1" / "stages"
    blocked.parent.mkdir(parents=True)
    blocked.write_text("in the way")
    process = start_process(*command, folder=here, cache=here / "cache")
    os.kill(wait_for_step(here, 2, 20), signal.SIGUSR2)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 2, (out, err)
    assert states(here) == {0: "done", 1: "failed", 2: "done"}
    assert re.search(r"error: of 3 jobs 1 failed:\n  job 1 \(seed=1\): .*stages", err)

    script = (stub / "script_7").read_text()
    asked = ["partition=small", "time=240", "gpus-per-node=1", "cpus-per-task=8", "mem=32GB"]
    asked += ["nodes=1", "ntasks-per-node=1", "signal=USR2@120", "array=0-2%2"]
    assert [a for a in asked if f"#SBATCH --{a}\n" not in script] == []

    assert [p.name for p in stub.glob("began_again_*")] == ["began_again_7_2"]
    steps = [
        int(line.split(",")[1])
        for line in (here / "sweep" / "2" / "metrics.csv").read_text().splitlines()
        if "train_loss" in line
    ]
    assert steps == list(range(300)), "the second beginning goes on where the first was"
    (written,) = (here / "sweep" / ".submitit").glob("*/7_2_0_log.out")
    assert "train: going on from step " in written.read_text()

    blocked.unlink()
    before = (here / "sweep" / "0" / "results.json").stat().st_mtime_ns
    done = run_process(*command, folder=here, cache=here / "cache")
    assert done.code == 0, done.err
    assert set(states(here).values()) == {"done"}
    assert (here / "sweep" / "0" / "results.json").stat().st_mtime_ns == before


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return how a command ended and what it said of errors; its jobs keep its pipes open."""
    assert process.stdout
    assert process.stderr
    code = process.wait(timeout=200)
    said = os.read(process.stderr.fileno(), 1 << 16).decode()
    process.stdout.close()
    process.stderr.close()
    return code, said


@pytest.mark.slow(minutes=1)
def test_jobs_outlive_the_command_and_are_left_alone_by_the_next_one(here: Path) -> None:
    """Of two jobs of this machine one is killed; the command ends, the other job goes on."""
    command = (*TINY, *LONG, "-m", "experiment=sft", "seed=0,1", "hydra.sweep.dir=sweep")
    command = (*command, "hydra/launcher=submitit_local")
    process = start_process(*command, folder=here, cache=here / "cache")
    first, second = wait_for_step(here, 0, 5), wait_for_step(here, 1, 5)
    # It sleeps, so that it is still there when the sweep is started again.
    os.kill(second, signal.SIGSTOP)
    try:
        os.kill(first, signal.SIGKILL)
        code, err = ended(process)
        assert code == 2, err
        assert "error: a job of the launcher ended without a result" in err
        assert states(here) == {0: "killed", 1: "running"}

        code, err = ended(start_process(*command, folder=here, cache=here / "cache"))
        assert code == 2, err
        assert "  job 1 (seed=1): running\n" in err
        assert states(here) == {0: "done", 1: "running"}
    finally:
        os.kill(second, signal.SIGCONT)
    deadline = time.monotonic() + 200
    while states(here)[1] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert states(here) == {0: "done", 1: "done"}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_job_of_a_launcher_may_take_several_devices(here: Path, launcher: str) -> None:
    command = (*TINY, "-m", "experiment=sft", "seed=0", "hydra.sweep.dir=sweep", "trainer=ddp")
    command = (*command, "trainer.accelerator=cpu", f"hydra/launcher={launcher}")
    done = run_process(*command, folder=here, cache=here / "cache")
    assert done.code == 0, done.err
    assert states(here) == {0: "done"}
    config = yaml.safe_load((here / "sweep" / "0" / "config.yaml").read_text())
    assert config["trainer"]["devices"] == 2


def test_the_keys_of_slurm_are_those_of_the_plugin() -> None:
    register_schemas()
    with initialize_config_dir(config_dir=str(cli.config_folder()), version_base="1.3"):
        plain = compose("run", ["hydra/launcher=submitit_slurm"], return_hydra_config=True)
        ours = compose("run", ["hydra/launcher=slurm"], return_hydra_config=True)
    assert set(ours.hydra.launcher) == set(plain.hydra.launcher)
    assert ours.hydra.launcher._target_ == plain.hydra.launcher._target_


def test_a_key_that_the_launcher_does_not_have(capfd, here: Path) -> None:
    done = run_here(capfd, *SWEEP, "hydra/launcher=slurm", "hydra.launcher.partitoin=gpu")
    assert done.code == 2
    assert done.err.startswith("error: hydra.launcher.partitoin: the config has no such key")


def test_no_slurm_on_this_machine(capfd, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(here))
    done = run_here(capfd, *SWEEP, "hydra/launcher=slurm")
    assert done.code == 2
    assert done.err.endswith(
        "error: hydra/launcher=slurm: this machine has no srun; start the sweep where SLURM's "
        "commands are, or run its jobs on this machine with hydra/launcher=joblib\n"
    )


def test_slurm_does_not_take_the_jobs(capfd, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub = slurm_stub.install(here / "slurm")
    (stub / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: no partition gpu' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", f"{stub}{os.pathsep}{os.environ['PATH']}")
    done = run_here(capfd, *SWEEP, "hydra/launcher=slurm")
    assert done.code == 2
    assert done.err.splitlines()[-1] == (
        "error: SLURM does not take the jobs: sbatch: error: no partition gpu; set "
        "hydra.launcher.<key>"
    )
    assert set(states(here).values()) == {"waiting"}
