"""What is written to Weights & Biases, read back from the offline files."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import TINY, fail_at_export, only_run, run_here
from wandb.proto import wandb_internal_pb2

from stillhouse.tracking.lineage import StageArtifact
from stillhouse.tracking.runs import RunInfo
from stillhouse.tracking.similarity_pictures import draw_similarity
from stillhouse.tracking.wandb import WandbTracking

BLOCK = 32 * 1024
WANDB = (*(a for a in TINY if a != "tracking=csv"), "tracking=wandb")


def records(path: Path) -> Iterator[Any]:
    """Read the records of an offline run: protobufs in the framing of LevelDB's log."""
    content, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = BLOCK - position % BLOCK
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def offline_runs(folder: Path) -> dict[str, list[Any]]:
    """Return job type -> records of every offline run in a run directory."""
    found = {}
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        read = list(records(path))
        # Under load the last of a short run reaches the file a moment behind its end.
        for _ in range(100):
            if of_kind(read, "exit"):
                break
            time.sleep(0.1)
            read = list(records(path))
        (run,) = (r.run for r in read if r.WhichOneof("record_type") == "run")
        found[run.job_type] = read
    return found


def of_kind(read: list[Any], kind: str) -> list[Any]:
    return [getattr(r, kind) for r in read if r.WhichOneof("record_type") == kind]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    return tmp_path


def test_a_recipe_is_one_run_a_stage(capfd, here: Path) -> None:
    done = run_here(capfd, *WANDB, "tracking.tags=[mine]")
    assert done.code == 0, done.err
    folder = only_run(here / "outputs")
    found = offline_runs(folder)
    assert set(found) == {"tokenizer", "teacher", "distil", "alone", "evaluate"}
    results = json.loads((folder / "results.json").read_text())

    (run,) = of_kind(found["distil"], "run")
    assert run.run_group == "word_kd"
    assert set(run.tags) == {"Fit", "mine", "word_kd"}
    config = {u.key: json.loads(u.value_json) for u in run.config.update}
    assert config["method"]["divergence"] == "forward_kl"
    assert config["stages"]["teacher"]["student"]["hidden_size"] == 32
    assert config["config_hash"] == results["config_hash"]
    assert config["git"] == results["git"]
    sizes = {
        u.key: json.loads(u.value_json)
        for r in of_kind(found["distil"], "config")
        for u in r.update
    }
    assert sizes["student_parameters"] == results["models"]["student"]["parameters"]
    assert sizes["teacher_parameters"] == results["models"]["teacher"]["parameters"]

    # Offline the inputs are named in the config; W&B takes edges only online.
    assert set(sizes["inputs"]) == {"teacher"}
    (made,) = of_kind(found["distil"], "artifact")
    assert made.name.startswith("distil-")
    assert made.type == "Fit"
    (entry,) = made.manifest.contents
    assert entry.ref == (folder / "stages" / "distil" / "manifest.json").as_uri()

    metrics = of_kind(found["distil"], "metric")
    assert any(m.glob_name == "*" and m.step_metric == "step" for m in metrics)
    logged = [
        {i.key or i.nested_key[0]: json.loads(i.value_json) for i in h.item}
        for h in of_kind(found["distil"], "history")
    ]
    losses = [(row["step"], row["train_loss"]) for row in logged if "train_loss" in row]
    assert [step for step, _ in losses] == [0, 1]
    (last,) = of_kind(found["distil"], "exit")
    assert last.exit_code == 0

    rows = [i for h in of_kind(found["evaluate"], "history") for i in h.item]
    assert any("samples" in (i.key or i.nested_key[0]) for i in rows)
    summary = {
        i.key or i.nested_key[0]: json.loads(i.value_json)
        for s in of_kind(found["evaluate"], "summary")
        for i in s.update
    }
    assert summary["student/test_nll"] == results["models"]["student"]["test_nll"]


def test_a_failed_stage_is_shown_as_failed_and_resumed_in_the_same_run(
    capfd, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as broken:
        fail_at_export(broken)
        assert run_here(capfd, *WANDB, "experiment=sft").code == 1
    folder = only_run(here / "outputs")
    ids = json.loads((folder / "wandb_ids.json").read_text())
    (failed,) = of_kind(offline_runs(folder)["train"], "exit")
    assert failed.exit_code == 1
    (begun,) = folder.glob(f"wandb/offline-run-*-{ids['train']}")

    again = run_here(capfd, f"resume={folder}")
    assert again.code == 0, again.err
    assert json.loads((folder / "wandb_ids.json").read_text())["train"] == ids["train"]
    both = sorted(folder.glob(f"wandb/offline-run-*-{ids['train']}"))
    assert len(both) == 2 or both == [begun]


def test_an_unknown_mode_is_refused(capfd, here: Path) -> None:
    done = run_here(capfd, *WANDB, "tracking.mode=of")
    assert done.code == 2
    assert done.err == "error: tracking.mode=of: expected auto or online or offline or disabled\n"
    assert not (here / "outputs" / "word_kd").exists() or not list(
        (here / "outputs" / "word_kd").iterdir()
    )


def test_a_picture_is_logged_as_an_image(here: Path) -> None:
    info = RunInfo(
        recipe="echoatt",
        seed=0,
        config_hash="0",
        git=None,
        folder=here,
        name="run",
        group="echoatt",
        overrides=[],
        config={},
        artifacts=[StageArtifact("analyse", "Analyse", "0" * 64, here)],
        last_stage="analyse",
    )
    picture = draw_similarity([[1.0, 0.5], [0.5, 1.0]], here / "similarity.png", "two layers")
    with WandbTracking(project="stillhouse").stage(info, "analyse", "Analyse", here) as tracker:
        tracker.picture("similarity", picture)
    rows = [i for h in of_kind(offline_runs(here)["analyse"], "history") for i in h.item]
    logged = {
        i.nested_key[1]: json.loads(i.value_json)
        for i in rows
        if i.nested_key and i.nested_key[0] == "similarity"
    }
    assert logged["_type"] == "image-file"
    (kept,) = here.glob(f"wandb/offline-run-*/files/{logged['path']}")
    assert kept.read_bytes() == picture.read_bytes()


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What `wandb agent` says to the command that it starts."""
    import wandb

    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep0")
    monkeypatch.setenv("WANDB_RUN_ID", "given0")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.parametrize(("words", "swept"), [((), "evaluate"), (("=train",), "train")])
def test_one_stage_has_the_run_of_the_agent(
    capfd, here: Path, agent: None, words: tuple[str, ...], swept: str
) -> None:
    chosen = [f"tracking.sweep_stage{word}" for word in words]
    done = run_here(capfd, *WANDB, "experiment=sft", *chosen)
    assert done.code == 0, done.err
    folder = only_run(here / "outputs")
    ids = json.loads((folder / "wandb_ids.json").read_text())
    assert [stage for stage, run_id in ids.items() if run_id == "given0"] == [swept]
    runs = {
        stage: next(r.run for r in read if r.WhichOneof("record_type") == "run")
        for stage, read in offline_runs(folder).items()
    }
    assert {stage: run.run_id for stage, run in runs.items()} == ids
    assert {run.run_group for run in runs.values()} == {"sweep0"}


def test_a_stage_for_the_agent_that_is_none(capfd, here: Path, agent: None) -> None:
    done = run_here(capfd, *WANDB, "experiment=sft", "tracking.sweep_stage=trian")
    assert done.code == 2
    assert done.err == (
        "error: tracking.sweep_stage=trian: this recipe has no stage of that name; its stages are "
        "tokenizer, train, evaluate; did you mean 'train'?\n"
    )
