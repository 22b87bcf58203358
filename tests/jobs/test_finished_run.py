"""A run that cannot be read is told in one line, whichever job asks."""

import json
import shutil
from pathlib import Path

import pytest
from commands import Finished, run_here

from stillhouse.errors import UserError
from stillhouse.jobs.finished_run import FinishedRun, as_texts

WANTED = (
    "expected a run directory, with config.yaml and results.json in it, such as "
    "outputs/<recipe>/<time>"
)
CONFIG = {
    "recipe": "word_kd",
    "product": "student",
    "models": {"teacher": "some/model", "student": "stages/distil", "left_out": None},
    "stages": {
        "tokenizer": {"_target_": "a.b"},
        "unused": {"_target_": "a.b"},
        "left_out": None,
        "windows": {"data": {"tokenizer_path": "stages/tokenizer"}},
        "distil": {"teacher": {"path": "some/model"}, "data": [{"path": "stages/windows"}]},
    },
}


@pytest.mark.parametrize("job", ["evaluate", "sample", "export"])
def test_what_is_no_run(capfd, here: Path, run: Path, job: str) -> None:
    (here / "empty").mkdir()
    for arguments, line in (
        ([], "run: name a run directory, such as run=outputs/word_kd/<time>"),
        (["run=emty"], f"run=emty: there is no such folder; {WANTED}; did you mean 'empty'?"),
        (["run=empty"], f"run=empty: the folder is no run directory; {WANTED}"),
        (
            [f"run={run.parent}"],
            f"run={run.parent}: the folder holds runs, the newest is run={run}; {WANTED}",
        ),
        (
            ["-m", f"run={run}"],
            f"-m: the job {job} leaves no run directory, so there is no sweep of it; start it once "
            "for each value, in a loop of the shell",
        ),
        (
            [str(run)],
            f"the argument '{run}' is not of the form key=value; quote values with spaces or "
            "commas as a whole: 'key=[a,b]'",
        ),
        (
            [f"run={run}", "experiment=sft"],
            f"experiment: the job {job} has no group of that name; groups make up the job run",
        ),
        ([f"run={run}", "too=x"], "too: the config has no such key; did you mean 'to'?"),
    ):
        done = run_here(capfd, "--config-name", job, *arguments)
        assert done == Finished(2, "", f"error: {line}\n")
    assert [p.name for p in here.iterdir()] == ["empty"]


@pytest.mark.parametrize("job", ["evaluate", "sample", "export"])
def test_a_run_that_is_not_done(capfd, here: Path, copy: Path, job: str) -> None:
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(results | {"status": "failed"}))
    done = run_here(capfd, "--config-name", job, f"run={copy}")
    assert done == Finished(
        2,
        "",
        f"error: run={copy}: its status is failed; expected a run that is done; go on with it: "
        f"python run.py resume={copy}\n",
    )
    assert not list(here.iterdir())


@pytest.mark.parametrize("content", ["a: [", "recipe: x", "[]"])
def test_a_config_that_cannot_be_read(capfd, here: Path, copy: Path, content: str) -> None:
    (copy / "config.yaml").write_text(content)
    done = run_here(capfd, "--config-name", "sample", f"run={copy}")
    assert done == Finished(
        2, "", f"error: run={copy}: its config.yaml cannot be read as the config of a run\n"
    )


def test_a_teacher_gone_with_the_cache_is_made_anew_by_resume(
    capfd, here: Path, copy: Path
) -> None:
    link = copy / "stages" / "teacher"
    link.unlink()
    link.symlink_to(here / "cleaned", target_is_directory=True)
    asked = ("--config-name", "sample", f"run={copy}", "role=teacher", "max_new_tokens=2")
    assert run_here(capfd, *asked) == Finished(
        2,
        "",
        f"error: run={copy}: stages/teacher leads to {here / 'cleaned'}, which is gone, perhaps "
        f"because the cache was cleaned; make it anew with: python run.py resume={copy}\n",
    )
    resumed = run_here(capfd, f"resume={copy}")
    assert resumed.code == 0, resumed.err
    assert run_here(capfd, *asked).code == 0


def test_a_model_that_is_gone(capfd, here: Path, copy: Path) -> None:
    anew = f"make it anew with: python run.py resume={copy}\n"
    shutil.rmtree(copy / "stages" / "alone")
    done = run_here(capfd, "--config-name", "export", f"run={copy}", "role=student_alone")
    assert done == Finished(2, "", f"error: run={copy}: it has no stages/alone any more; {anew}")
    (copy / "student" / "config.json").unlink()
    for job in ("sample", "export", "evaluate"):
        done = run_here(capfd, "--config-name", job, f"run={copy}", *_only_student(job))
        assert done == Finished(
            2,
            "",
            f"error: role student: the folder {copy / 'student'} has no config.json; expected a "
            f"model, as save_pretrained writes it; {anew}",
        )
    assert not list(here.iterdir())


def _only_student(job: str) -> list[str]:
    return ["roles=student"] if job == "evaluate" else []


def test_the_product_needs_no_stages(capfd, here: Path, copy: Path) -> None:
    shutil.rmtree(copy / "stages")
    for job in ("sample", "export"):
        assert run_here(capfd, "--config-name", job, f"run={copy}").code == 0


def test_a_model_of_the_hub_is_passed_on_as_it_is(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, CONFIG, {})
    assert run.model("teacher") == "some/model"
    assert list(run.models) == ["teacher", "student"]
    for path, line in (
        ("./gone", "models.teacher=./gone: there is no such folder"),
        (str(tmp_path), f"models.teacher={tmp_path}: the folder has no config.json; expected a"),
    ):
        models = {**CONFIG["models"], "teacher": path}
        with pytest.raises(UserError) as told:
            FinishedRun(tmp_path, {**CONFIG, "models": models}, {}).model("teacher")
        assert str(told.value).startswith(line)


def test_only_whole_values_that_name_a_stage_are_artifacts(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, CONFIG, {})
    (tmp_path / "stages" / "distil").mkdir(parents=True)
    node = {"a": "stages/distil", "b": ["stages/other", "stages/distil/x", 3], "c": None}
    assert run.located(node) == {**node, "a": str(tmp_path / "stages" / "distil")}


def test_stages_behind_are_followed_through_lists_and_data(tmp_path: Path) -> None:
    run = FinishedRun(tmp_path, CONFIG, {})
    assert run.stages_behind("distil") == ["tokenizer", "windows", "distil"]


@pytest.mark.parametrize("value", [[], [1], 3, ["a", None]])
def test_texts_are_a_list_or_one(value: object) -> None:
    assert as_texts("a b", key="prompts", example="x") == ["a b"]
    with pytest.raises(UserError, match=r"prompts=.*: expected a list of texts, such as 'prompts="):
        as_texts(_as_hydra_gives(value), key="prompts", example="x,y")


def _as_hydra_gives(value: object) -> object:
    from omegaconf import OmegaConf

    return OmegaConf.create(value) if isinstance(value, list) else value
