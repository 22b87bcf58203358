"""What a sweep shares is made once: the cache, its lock, and repair of what is damaged in it."""

import json
from pathlib import Path

import pytest
from commands import TINY, only_run, run_here, start_process


@pytest.mark.slow
def test_two_processes_at_once_train_one_teacher(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    arguments = (*TINY, "stages.teacher.trainer.max_steps=40")
    processes = [start_process(*arguments, folder=tmp_path, cache=cache) for _ in range(2)]
    ended = [p.communicate(timeout=250) for p in processes]
    assert [p.returncode for p in processes] == [0, 0], ended
    trained = [out for out, _ in ended if "teacher: step" in out]
    assert len(trained) == 1, "each process trained a teacher of its own"
    folders = [results.parent for results in (tmp_path / "outputs").glob("*/*/results.json")]
    assert len(folders) == 2
    assert len({(f / "stages" / "teacher").resolve() for f in folders}) == 1
    told = [json.loads((f / "results.json").read_text())["stages"]["teacher"] for f in folders]
    assert sorted(stage["status"] for stage in told) == ["cached", "done"]
    weights = [(f / "student" / "model.safetensors").read_bytes() for f in folders]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("harm", ["cut short", "edited", "lost", "no manifest"])
def test_a_damaged_teacher_is_made_anew_with_a_warning(capfd, here: Path, harm: str) -> None:
    assert run_here(capfd, *TINY, "stop_after=teacher").code == 0
    (teacher,) = (p for p in (here / "cache").glob("teacher-*") if p.is_dir())
    weights = teacher / "model.safetensors"
    whole = weights.read_bytes()
    if harm == "cut short":
        weights.write_bytes(whole[:-100])
    elif harm == "edited":
        weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    elif harm == "lost":
        weights.unlink()
    else:
        (teacher / "manifest.json").unlink()
    plan = run_here(capfd, *TINY, "plan=true")
    assert "made anew" in plan.out
    done = run_here(capfd, *TINY, "stop_after=teacher", "paths.outputs=second")
    assert done.code == 0, done.err
    assert "warning: teacher is made anew: in " in done.out
    assert (teacher / "model.safetensors").read_bytes() == whole


def test_an_edited_loss_is_computed_again_and_the_teacher_is_not(
    capfd, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fingerprint of a stage holds the source of what its targets import."""
    from stillhouse.stages import fingerprint

    assert run_here(capfd, *TINY).code == 0
    folder = only_run(here / "outputs")
    original = fingerprint.source_hash

    def edited(target: str) -> str:
        mark = "edited" if target.endswith("word_kd.word_kd") else ""
        return original(target) + mark

    monkeypatch.setattr(fingerprint, "source_hash", edited)
    again = run_here(capfd, f"resume={folder}")
    assert again.code == 0, again.err
    results = json.loads((folder / "results.json").read_text())
    statuses = {name: stage["status"] for name, stage in results["stages"].items()}
    assert "warning: distil is made anew" in again.out
    assert "alone is made anew" not in again.out
    assert "teacher is made anew" not in again.out
    assert statuses["teacher"] == "cached"


def test_plan_says_what_would_run_and_runs_nothing(capfd, here: Path) -> None:
    first = run_here(capfd, *TINY, "plan=true")
    assert first.code == 0, first.err
    assert "nothing was run" in first.out
    assert not (here / "outputs").exists()
    assert run_here(capfd, *TINY, "stop_after=teacher").code == 0
    second = run_here(capfd, *TINY, "plan=true")
    assert second.out.count("taken from the cache") == 2
    outside = only_run(here / "outputs") / "stages" / "teacher"
    third = run_here(capfd, *TINY, "plan=true", "teacher=hf", f"teacher.path={outside}")
    assert third.out.count("left out: no stage needs it") == 3


def test_force_does_a_finished_stage_again(capfd, here: Path) -> None:
    assert run_here(capfd, *TINY).code == 0
    folder = only_run(here / "outputs")
    manifest = folder / "stages" / "distil" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    weights = (folder / "student" / "model.safetensors").read_bytes()
    done = run_here(capfd, *TINY, f"resume={folder}", "force=distil")
    assert done.code == 0, done.err
    assert manifest.stat().st_mtime_ns > before
    assert (folder / "student" / "model.safetensors").read_bytes() == weights


def test_a_teacher_from_outside_needs_no_stage(capfd, here: Path) -> None:
    """`teacher=hf` takes model and tokenizer from a folder; nothing is trained for it."""
    assert run_here(capfd, *TINY, "stop_after=teacher").code == 0
    outside = only_run(here / "outputs") / "stages" / "teacher"
    done = run_here(
        capfd, *TINY, "paths.outputs=second", "teacher=hf", f"teacher.path={outside.resolve()}"
    )
    assert done.code == 0, done.err
    results = json.loads((only_run(here / "second") / "results.json").read_text())
    assert list(results["stages"]) == ["distil", "alone", "evaluate"]
    assert results["models"]["teacher"]["kl_to_teacher"] < 1e-6


def test_what_one_command_asked_is_not_asked_again_by_resume(capfd, here: Path) -> None:
    """`stop_after`, `plan` and `force` speak of one command; the run's own keys are kept."""
    assert run_here(capfd, *TINY, "seed=3", "stop_after=teacher").code == 0
    folder = only_run(here / "outputs")
    planned = run_here(capfd, "plan=true", f"resume={folder}")
    assert planned.code == 0, planned.err
    assert "nothing was run" in planned.out
    done = run_here(capfd, f"resume={folder}", "tracking=none")
    assert done.code == 0, done.err
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "done"
    assert results["seed"] == 3


def test_scratch_begun_by_another_version_is_not_gone_on_with(
    capfd, here: Path, monkeypatch
) -> None:
    from stillhouse.families.sequence.module import SequenceDistiller

    with monkeypatch.context() as broken:
        broken.setattr(SequenceDistiller, "export", lambda *args: 1 / 0)
        assert run_here(capfd, *TINY, "experiment=sft").code == 1
    folder = only_run(here / "outputs")
    assert list((folder / "work" / "train" / "checkpoints").iterdir())
    (folder / "work" / "train" / "fingerprint").write_text("of another version")
    again = run_here(capfd, f"resume={folder}")
    assert again.code == 0, again.err
    assert "going on from step" not in again.out
