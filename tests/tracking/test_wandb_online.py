"""What the real W&B client sends, online, read back from a server on loopback."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, fail_at_export, kill, only_run, run_here, run_process, start_process
from tracking.wandb_stub import ENTITY, KEY, WandbStub

from stillhouse.tracking.loggers import SeriesLogger
from stillhouse.tracking.series import read_series
from stillhouse.tracking.wandb import MARGIN, StepWandbLogger

WANDB = (*(a for a in TINY if a != "tracking=csv"), "tracking=wandb")


Values = set[tuple[int, str, float]]


def values(history: list[dict[str, Any]]) -> Values:
    """Return (step, metric, value) of rows of W&B's history, its own numbers left out."""
    return {
        (row["step"], name, value)
        for row in history
        for name, value in row.items()
        if name != "step" and not name.startswith("_")
    }


def values_in(path: Path, stage: str) -> Values:
    """Return (step, metric, value) of a stage in `metrics.csv`."""
    return {(step, name, value) for of, step, name, value in read_series(path) if of == stage}


def test_a_recipe_is_sent_as_one_run_a_stage(capfd, here: Path, server: WandbStub) -> None:
    done = run_here(capfd, *WANDB, "tracking.tags=[mine]")
    assert done.code == 0, done.err
    assert server.unknown == []
    folder = only_run(here / "outputs")
    results = json.loads((folder / "results.json").read_text())
    ids = json.loads((folder / "wandb_ids.json").read_text())
    urls = json.loads((folder / "wandb_urls.json").read_text())

    assert set(ids) == {"tokenizer", "teacher", "distil", "alone", "evaluate"}
    for stage, run_id in ids.items():
        run = server.runs[run_id]
        assert run.project == "stillhouse"
        assert run.fields["jobType"] == stage
        assert run.fields["groupName"] == "word_kd"
        assert run.fields["displayName"] == f"{folder.name}/{stage}"
        assert {"mine", "word_kd"} < set(run.fields["tags"])
        assert urls[stage] == f"{server.url}/{ENTITY}/stillhouse/runs/{run_id}"
        assert run.begun == 1
        assert run.exit_codes == [0]
        # The config stays nested, so that W&B can filter by `method.divergence`.
        assert run.config["method"]["divergence"] == "forward_kl"
        assert run.config["stages"]["teacher"]["student"]["hidden_size"] == 32
        assert run.config["stage"] == stage
        assert run.config["config_hash"] == results["config_hash"]
        assert run.config["git"] == results["git"]
        assert {"config.yaml", "wandb-metadata.json", "wandb-summary.json"} <= set(run.files)
        assert KEY not in json.dumps(run.config)

    fit = server.run_of("distil")
    assert "Fit" in fit.fields["tags"]
    for role in ("student", "teacher"):
        assert fit.config[f"{role}_parameters"] == results["models"][role]["parameters"]


def test_series_summary_and_samples_are_those_of_the_run_directory(
    capfd, here: Path, server: WandbStub
) -> None:
    done = run_here(capfd, *WANDB, "experiment=sft")
    assert done.code == 0, done.err
    folder = only_run(here / "outputs")
    results = json.loads((folder / "results.json").read_text())

    train = server.run_of("train")
    kept = values_in(folder / "metrics.csv", "train")
    assert {name for _, name, _ in kept} >= {"train_loss", "val_nll"}
    assert values(train.history) == kept
    # Every metric's axis is `step`. The client's shorthand: 1 a name, 2 a pattern, 5 its axis.
    axes = train.client["m"]
    assert [(m.get("2"), m.get("5")) for m in axes if "2" in m] == [("*", 1)]
    assert axes[0]["1"] == "step"

    numbers = results["stages"]["train"]["metrics"]
    assert {name: train.summary[name] for name in numbers} == numbers
    evaluate = server.run_of("evaluate")
    student = results["models"]["student"]
    measured = {n: v for n, v in student.items() if f"student/{n}" in evaluate.summary}
    assert "test_nll" in measured
    assert {n: evaluate.summary[f"student/{n}"] for n in measured} == measured

    (row,) = (row for row in evaluate.history if "samples" in row)
    assert row["samples"]["_type"] == "table-file"
    table = json.loads(evaluate.files[row["samples"]["path"]])
    assert table["columns"] == ["model", "prompt", "continuation"]
    assert len(table["data"]) == row["samples"]["nrows"] > 0


def test_a_failed_stage_is_told_and_its_run_gone_on_with(
    capfd, here: Path, server: WandbStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        fail_at_export(broken)
        assert run_here(capfd, *WANDB, "experiment=sft").code == 1
    folder = only_run(here / "outputs")
    ids = json.loads((folder / "wandb_ids.json").read_text())
    assert set(server.runs) == {ids["tokenizer"], ids["train"]}
    train = server.run_of("train")
    assert train.exit_codes == [1]
    assert (train.begun, train.asked) == (1, 0)
    before = list(train.history)
    assert before

    again = run_here(capfd, f"resume={folder}")
    assert again.code == 0, again.err
    assert json.loads((folder / "wandb_ids.json").read_text())["train"] == ids["train"]
    assert server.run_of("train") is train
    assert train.exit_codes == [1, 0]
    assert (train.begun, train.asked) == (2, 1)
    # What the first attempt logged stands, and what follows lies behind it.
    assert train.history[: len(before)] == before
    lines = [row["_step"] for row in train.history]
    assert lines == sorted(set(lines))
    assert values(train.history) == values_in(folder / "metrics.csv", "train")
    assert server.run_of("tokenizer").begun == 1
    assert server.run_of("evaluate").exit_codes == [0]
    assert server.unknown == []


def test_teacher_cache_and_student_are_linked_by_reference(
    capfd, here: Path, server: WandbStub
) -> None:
    done = run_here(capfd, *WANDB, "teacher=cached", "stages.alone=null", "stages.evaluate=null")
    assert done.code == 0, done.err
    assert server.unknown == []
    folder = only_run(here / "outputs")
    ids = json.loads((folder / "wandb_ids.json").read_text())
    made = {a.name.partition("-")[0]: a for a in server.artifacts.values()}
    assert set(made) == set(ids) == {"tokenizer", "teacher", "cache", "distil"}
    assert {stage: a.made_by for stage, a in made.items()} == ids
    edges = {(stage, run) for stage, a in made.items() for run in a.used_by}
    assert edges >= {
        ("teacher", ids["cache"]),
        ("teacher", ids["distil"]),
        ("cache", ids["distil"]),
    }
    assert made["distil"].used_by == []

    for stage, artifact in made.items():
        home = (folder / "stages" / stage).resolve()
        manifest = json.loads((home / "manifest.json").read_text())
        assert artifact.name == f"{stage}-{manifest['fingerprint'][:20]}"
        assert artifact.committed
        assert artifact.files == {}
        (entry,) = artifact.manifest["contents"].values()
        assert entry["ref"] == (home / "manifest.json").as_uri()
        assert artifact.metadata["folder"] == str(home)
        assert artifact.metadata["metrics"] == manifest["metrics"]
        used = {(used, made[used].name) for used, run in edges if run == ids[stage]}
        assert set(server.runs[ids[stage]].config.get("inputs", {}).items()) == used
    assert (made["cache"].type, made["distil"].type) == ("CacheSignal", "Fit")


def test_a_student_of_a_teacher_from_the_cache_meets_its_artifact(
    capfd, here: Path, server: WandbStub
) -> None:
    words = (*WANDB, "stages.alone=null", "stages.evaluate=null")
    assert run_here(capfd, *words, "seed=0").code == 0
    assert run_here(capfd, *words, "seed=1").code == 0
    (teacher,) = (a for a in server.artifacts.values() if a.name.startswith("teacher-"))
    students = [r.id for r in server.runs.values() if r.fields["jobType"] == "distil"]
    assert len(students) == 2
    assert sorted(teacher.used_by) == sorted(students)
    assert teacher.made_by == server.run_of("teacher").id


def test_files_are_uploaded_when_asked_and_nothing_is_told_when_not(
    capfd, here: Path, server: WandbStub
) -> None:
    words = (*WANDB, "experiment=sft", "stages.evaluate=null")
    assert run_here(capfd, *words, "tracking.upload=true").code == 0
    folder = only_run(here / "outputs")
    (student,) = (a for a in server.artifacts.values() if a.name.startswith("train-"))
    for name in ("model.safetensors", "config.json", "manifest.json"):
        assert student.files[name] == (folder / "stages" / "train" / name).read_bytes()

    server.artifacts.clear()
    assert run_here(capfd, *words, "tracking.lineage=false", "seed=1").code == 0
    assert server.artifacts == {}
    assert all("inputs" not in r.config for r in server.runs.values() if r.config["seed"] == 1)


def test_the_runs_of_a_sweep_are_one_group(capfd, here: Path, server: WandbStub) -> None:
    words = ("experiment=sft", "stages.evaluate=null", "hydra.sweep.dir=sweeps/lengths")
    done = run_here(capfd, "--multirun", *WANDB, *words, "seed=0,1")
    assert done.code == 0, done.err
    trained = [r for r in server.runs.values() if r.fields["jobType"] == "train"]
    assert {r.fields["groupName"] for r in trained} == {"lengths"}
    assert {r.config["seed"] for r in trained} == {0, 1}
    assert len({r.fields["displayName"] for r in trained}) == 2
    assert len({r.config["config_hash"] for r in trained}) == 1


def test_steps_that_are_done_again_are_sent_once_and_lacking_ones_made_good(tmp_path: Path) -> None:
    class Run:
        def __init__(self) -> None:
            self.rows: list[dict[str, Any]] = []

        def log(self, row: dict[str, Any]) -> None:
            self.rows.append(row)

    series = SeriesLogger(tmp_path / "metrics.csv", "train")
    for step in range(4):
        series.log_metrics({"loss": step / 2, "epoch": 0}, step)
    series.log_metrics({"val_nll": 1.5}, 3)

    behind = Run()  # W&B has steps 0 and 1, the checkpoint lies at step 4
    logger = StepWandbLogger(behind, series, lacking=2)
    logger.log_metrics({"loss": 2.0}, 4)
    assert [row["step"] for row in behind.rows] == [2, 3, 4]
    assert behind.rows[1] == {"loss": 1.5, "val_nll": 1.5, "step": 3}

    series.drop_after(1)
    ahead = Run()  # W&B has steps up to 3, the checkpoint lies at step 1
    logger = StepWandbLogger(ahead, series, lacking=3)
    for step in range(1, 5):
        logger.log_metrics({"loss": step / 2}, step)
    assert [row["step"] for row in ahead.rows] == [3, 4]


@pytest.mark.slow(minutes=1)
def test_a_killed_run_goes_on_in_the_same_wandb_run(
    here: Path, server: WandbStub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB__FILE_STREAM_TRANSMIT_INTERVAL", "1")
    length = ("trainer.max_steps=600", "trainer.val_check_interval=600")
    words = (*WANDB, "experiment=sft", "tracking.mode=online", *length)
    process = start_process(*words, folder=here, cache=here / "cache")
    try:
        deadline = time.monotonic() + 200
        while not any(r.history for r in list(server.runs.values())):
            assert process.poll() is None, "the run ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        kill(process)
    train = server.run_of("train")
    before = list(train.history)
    assert train.exit_codes == []
    folder = only_run(here / "outputs")

    again = run_process(f"resume={folder}", folder=here, cache=here / "cache")
    assert again.code == 0, again.err
    assert server.run_of("train") is train
    assert train.history[: len(before)] == before
    assert (train.begun, train.asked, train.exit_codes) == (2, 1, [0])
    # What was logged between the last sending and the kill is there too; steps at the seam may lie
    # there twice.
    steps = [row["step"] for row in train.history if "train_loss" in row]
    assert sorted(set(steps)) == list(range(600))
    assert len(steps) <= 602 + MARGIN
    assert values(train.history) == values_in(folder / "metrics.csv", "train")
