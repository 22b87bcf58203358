"""`trainer=ddp`: two processes on half the batch each are one process on the whole batch."""

import json
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from commands import (
    ROOT,
    TINY,
    Finished,
    command_line,
    environment,
    only_run,
    run_here,
    run_process,
    start_process,
)
from safetensors.torch import load_file
from torch.testing import assert_close

from stillhouse.tracking.series import read_series

# Documents of very different lengths: the ranks' token counts differ in every step.
UNEQUAL = (
    *TINY,
    "data.packing=false",
    "data.sequence_length=64",
    "data.max_train_documents=40",
    "trainer.max_steps=6",
    "trainer.val_check_interval=2",
    "callbacks.checkpoint.checkpoint_every_n_steps=100",
    "trainer.accumulate_grad_batches=2",
    "method.cross_entropy_weight=0.25",
)


def series_of(folder: Path, stage: str) -> dict[tuple[str, int], float]:
    """Return (metric, step) -> value of a stage."""
    rows = read_series(folder / "metrics.csv")
    return {(metric, step): value for name, step, metric, value in rows if name == stage}


def stages_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())["stages"]


@pytest.mark.slow
def test_a_sweep_starts_its_ranks_for_each_job_anew(tmp_path: Path) -> None:
    """The jobs share a process; the last is the run that it would be alone."""
    arguments = (*TINY, "experiment=sft", "trainer=ddp")
    sweep = (*arguments, "-m", "seed=0,1", "hydra.sweep.dir=sweep")
    done = run_process(*sweep, folder=tmp_path, cache=tmp_path / "cache")
    assert done.code == 0, done.err
    assert done.err == ""
    done = run_process(*arguments, "seed=1", folder=tmp_path, cache=tmp_path / "cache")
    assert done.code == 0, done.err
    alone = only_run(tmp_path / "outputs")
    students = [tmp_path / "sweep" / "0", tmp_path / "sweep" / "1", alone]
    first, last, same = [(f / "student" / "model.safetensors").read_bytes() for f in students]
    assert last == same != first


def test_two_processes_are_one_on_the_whole_batch(tmp_path: Path) -> None:
    one, two, cache = tmp_path / "one", tmp_path / "two", tmp_path / "cache"
    one.mkdir()
    two.mkdir()
    done = run_process(*UNEQUAL, "data.batch_size=4", "stop_after=distil", folder=one, cache=cache)
    assert done.code == 0, done.err
    ddp = ("trainer=ddp", "data.batch_size=2", "stop_after=alone")
    done = run_process(*UNEQUAL, *ddp, folder=two, cache=cache)
    assert done.code == 0, done.err
    assert done.err == ""
    assert done.out.count("distil: step 6/6") == 1, "one rank speaks"

    one, two = only_run(one / "outputs"), only_run(two / "outputs")
    assert not list(two.rglob("rank_*.log"))
    assert stages_of(two)["alone"]["status"] == "done", "a second stage finds its ranks too"
    whole, halves = stages_of(one)["distil"]["metrics"], stages_of(two)["distil"]["metrics"]
    assert halves["tokens_seen"] == whole["tokens_seen"]
    assert halves == pytest.approx(whole, rel=1e-4)
    expected = series_of(one, "distil")
    assert series_of(two, "distil") == pytest.approx(expected, rel=1e-4)
    assert {name for name, _ in expected} == {
        "train_loss",
        "train_forward_kl",
        "train_cross_entropy",
        "val_nll",
    }
    student = load_file(two / "stages" / "distil" / "model.safetensors")
    for name, tensor in load_file(one / "stages" / "distil" / "model.safetensors").items():
        assert_close(student[name], tensor, rtol=1e-3, atol=1e-4)


def run_with_rank_stages(*arguments: str, folder: Path) -> Finished:
    """Run `python run.py …` where other processes find the tests' own methods."""
    env = environment(folder / "cache")
    env["PYTHONPATH"] += f":{ROOT / 'tests'}"
    done = subprocess.run(
        command_line(*TINY, "trainer=ddp", *arguments),
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def test_loss_that_is_nan_on_one_rank_ends_the_run_in_one_line(tmp_path: Path) -> None:
    done = run_with_rank_stages("method._target_=rank_stages.nan_on_rank_one", folder=tmp_path)
    assert done.code == 2
    assert done.err == (
        "error: rank 1 of 2 in the stage distil: the loss is nan at step 0, batch 0; an earlier "
        "checkpoint, if there is one, is kept; lower optimizer.learning_rate, or clip with "
        "trainer.gradient_clip_val\n"
    )
    results = json.loads((only_run(tmp_path / "outputs") / "results.json").read_text())
    assert results["status"] == results["stages"]["distil"]["status"] == "failed"


@pytest.mark.slow
def test_value_out_of_range_on_every_rank_is_told_once(tmp_path: Path) -> None:
    done = run_with_rank_stages("method.divergence=jsd", "method.beta=2", folder=tmp_path)
    assert done.code == 2
    assert done.err == "error: method.beta=2: expected the teacher's weight, in [0, 1]\n"


@pytest.mark.slow
def test_a_loss_that_leaves_parameters_unused_names_the_strategy_that_takes_it(
    tmp_path: Path,
) -> None:
    arguments = (*TINY, "experiment=ernie_tiny", "trainer=ddp")
    strategy = "trainer.strategy=ddp_find_unused_parameters_true"
    for name in ("refused", "taken"):
        (tmp_path / name).mkdir()
    done = run_process(*arguments, folder=tmp_path / "refused", cache=tmp_path / "one")
    assert done.code == 2
    assert done.err == (
        "error: stage pretraining: trainer.strategy=ddp: the loss leaves a part of the student "
        f"unused; set {strategy}\n"
    )
    taken = run_process(*arguments, strategy, folder=tmp_path / "taken", cache=tmp_path / "two")
    assert taken.code == 0, taken.err


@pytest.mark.slow
def test_rank_zero_that_cannot_hear_of_a_failure_does_not_wait(tmp_path: Path) -> None:
    done = run_with_rank_stages(
        "method._target_=rank_stages.rank_zero_hears_nothing", folder=tmp_path
    )
    assert done.code == 2
    assert done.err == "error: rank 1 of 2 in the stage distil: rank 1 has had enough\n"


LONG = (
    *TINY,
    "experiment=sft",
    "trainer=ddp",
    "trainer.max_steps=160",
    "trainer.val_check_interval=20",
    "callbacks.checkpoint.checkpoint_every_n_steps=4",
    # Dropout makes every step depend on the state of each rank's random generator.
    "student.attention_dropout=0.1",
    "tracking=csv",
)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Start a command, wait until it has trained for a while, and return it."""
    wanted = random.randint(10, 100)
    process = start_process(*arguments, folder=folder, cache=folder / "cache")
    deadline = time.monotonic() + 100
    while True:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        series = [p.read_text() for p in folder.glob("outputs/*/*/work/train/metrics.csv")]
        if series and len(series[0].splitlines()) > wanted:
            return process
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the run that nothing stops."""
    folder = tmp_path_factory.mktemp("whole")
    done = run_process(*LONG, folder=folder, cache=folder / "cache")
    assert done.code == 0, done.err
    return only_run(folder / "outputs")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_stopped_and_resumed_equals_uninterrupted_with_dropout(
    tmp_path: Path, uninterrupted: Path, how
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    process = start(broken, *LONG)
    process.send_signal(how)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-how if how == signal.SIGKILL else 130)
    assert err == ""
    folder = only_run(broken / "outputs")
    if how != signal.SIGKILL:
        assert out.endswith(f"interrupted; go on with: python run.py resume={folder}\n")

    done = run_process(f"resume={folder}", folder=broken, cache=broken / "cache")
    assert done.code == 0, done.err
    assert "train: going on from step" in done.out
    model = Path("stages/train/model.safetensors")
    resumed = load_file(folder / model)
    for name, tensor in load_file(uninterrupted / model).items():
        assert_close(resumed[name], tensor, rtol=0, atol=0)
    assert stages_of(folder)["train"]["metrics"] == stages_of(uninterrupted)["train"]["metrics"]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["trainer.num_nodes=2"],
            "trainer.num_nodes=2: this version trains on one machine; set trainer.num_nodes=1, and "
            "trainer.devices=<number> for several devices of it",
        ),
        (
            ["trainer.devices=0"],
            "trainer.devices=0: expected how many (1 or more), a list of which, or -1 for all that "
            "there are",
        ),
        (
            ["trainer=ddp", "trainer.strategy=ddp_spawn"],
            "trainer.strategy=ddp_spawn: it starts processes in its own way, and a stage starts "
            "them itself; set trainer.strategy=ddp",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_devices_that_are_refused(capfd, tmp_path, monkeypatch, arguments, line) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_here(capfd, *TINY, *arguments) == Finished(2, "", f"error: {line}\n")
    assert not list(tmp_path.rglob("*.yaml")), "a run that never began left files"


def test_devices_are_refused_where_a_launcher_has_started_ranks(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_RANK", "1")
    done = run_here(capfd, *TINY, "trainer=ddp")
    assert done == Finished(
        2,
        "",
        "error: trainer.devices=2 where LOCAL_RANK=1 is set, as torchrun does: a stage starts its "
        "processes itself; start the command once, without torchrun\n",
    )


def test_run_is_not_resumed_with_another_number_of_processes(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    done = run_here(capfd, *TINY, "experiment=sft", "stop_after=tokenizer", "trainer=ddp")
    assert done.code == 0, done.err
    folder = only_run(tmp_path / "outputs")
    kept = (folder / ".hydra" / "overrides.yaml").read_text()
    assert run_here(capfd, f"resume={folder}", "trainer.devices=1") == Finished(
        2,
        "",
        f"error: resume={folder}: its config differs from this command's (1 keys, then -> now): "
        "trainer.devices: 2 -> 1; give the same keys, or start a new run\n",
    )
    assert (folder / ".hydra" / "overrides.yaml").read_text() == kept
