"""The job `evaluate`: the run's own numbers again, others beside them, other settings."""

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from commands import Finished, run_here

from stillhouse.config import signatures
from stillhouse.data.language import LanguageData
from stillhouse.errors import UserError
from stillhouse.evaluation import language_models as evaluators
from stillhouse.evaluation.language_models import language_models
from stillhouse.evaluation.positions import KEY

EVALUATE = ("--config-name", "evaluate")
QUALITY = ("test_nll", "kl_to_teacher", "top1_agreement", "expected_acceptance", "parameters")


def keywords(target: Callable[..., Any]) -> str:
    return ", ".join(signatures.keywords_of(target) or {})


def numbers_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "models.json").read_text())


def own_numbers(run: Path) -> dict[str, Any]:
    return json.loads((run / "results.json").read_text())["models"]


def quality(numbers: dict[str, Any]) -> dict[str, float]:
    return {name: numbers[name] for name in QUALITY}


def test_it_gives_the_runs_own_numbers_again(capfd, here: Path, run: Path) -> None:
    done = run_here(capfd, *EVALUATE, f"run={run}")
    assert (done.code, done.err) == (0, "")
    assert [p.name for p in here.iterdir()] == ["evaluate"]
    assert sorted(p.name for p in (here / "evaluate").iterdir()) == ["models.json", "samples.json"]
    anew, own = numbers_in(here / "evaluate"), own_numbers(run)
    assert list(anew) == list(own) == ["teacher", "student_alone", "student"]
    for role in own:
        assert quality(anew[role]) == quality(own[role])
    samples = json.loads((here / "evaluate" / "samples.json").read_text())
    assert samples == json.loads((run / "stages" / "evaluate" / "samples.json").read_text())
    assert "│ test_nll " in done.out
    assert f"{own['student']['test_nll']:.4g} │" in done.out
    assert done.out.splitlines()[-1] == "evaluate: models.json, samples.json"


def test_some_roles_other_models_other_settings_and_data(capfd, here: Path, run: Path) -> None:
    done = run_here(
        capfd,
        *EVALUATE,
        f"run={run}",
        "roles=[student]",
        f"models.copy={run}/student",
        "+settings.max_new_tokens=2",
        "settings.prompts=[And,Thus it is]",
        "data.max_evaluation_windows=3",
        "to=there",
    )
    assert done.code == 0, done.err
    anew, own = numbers_in(here / "there"), own_numbers(run)
    assert list(anew) == ["teacher", "student", "copy"], "the reference is measured too"
    assert quality(anew["copy"]) == quality(anew["student"])
    assert anew["student"]["test_nll"] != own["student"]["test_nll"]
    samples = json.loads((here / "there" / "samples.json").read_text())
    assert [row[:2] for row in samples[:2]] == [["teacher", "And"], ["teacher", "Thus it is"]]
    assert [p.name for p in here.iterdir()] == ["there"]


def test_without_a_reference_a_role_stands_alone(capfd, here: Path, run: Path) -> None:
    done = run_here(capfd, *EVALUATE, f"run={run}", "roles=student", "settings.reference=null")
    assert done.code == 0, done.err
    anew = numbers_in(here / "evaluate")
    assert list(anew) == ["student"]
    assert anew["student"]["test_nll"] == own_numbers(run)["student"]["test_nll"]
    assert "kl_to_teacher" not in anew["student"]


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "roles=[techer]",
            "roles=techer: there is no such model; expected teacher, student_alone, student; "
            "did you mean 'teacher'?",
        ),
        (
            "roles=[]",
            "roles=[]: expected a list of texts, such as 'roles=[teacher, student_alone, student]'",
        ),
        (
            "settings.temprature=1",
            "settings.temprature: language_models takes no 'temprature'; it takes "
            f"{keywords(language_models)}; did you mean 'temperature'?",
        ),
        ("+settings.max_new_tokens=many", "settings.max_new_tokens=many: expected int"),
        (
            "settings.reference=techer",
            "settings.reference=techer: there is no such model; expected teacher, student_alone, "
            "student; did you mean 'teacher'?",
        ),
        (
            "data.sequence_lenght=8",
            "data.sequence_lenght: LanguageData takes no 'sequence_lenght'; it takes "
            f"{keywords(LanguageData)}; did you mean 'sequence_length'?",
        ),
        (
            "data=king_james",
            "data: the job evaluate has no group of that name; groups make up the job run",
        ),
        (
            "models.student=some/model",
            "models.student: the run has a model of that name; expected another name than teacher, "
            "student_alone, student",
        ),
        ("models.other=./gone", "models.other=./gone: there is no such folder"),
        (
            "models.other=.",
            "models.other=.: the folder has no config.json; expected a model saved with "
            "save_pretrained, for example the student/ of a run directory",
        ),
    ],
    ids=lambda value: value if "=" in value and ":" not in value else "",
)
def test_bad_values(capfd, here: Path, run: Path, argument: str, line: str) -> None:
    done = run_here(capfd, *EVALUATE, f"run={run}", argument)
    assert done == Finished(2, "", f"error: {line}\n")
    assert not list(here.iterdir())


def test_a_setting_that_the_evaluator_refuses_is_named_as_it_was_set(
    capfd, here: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evaluators name their keys as those of a stage."""

    @wraps(language_models)
    def refuse(*_: object, **__: object) -> None:
        raise UserError(f"{KEY}.prompts=[]: expected one prompt or more")

    monkeypatch.setattr(evaluators, "language_models", refuse)
    done = run_here(capfd, *EVALUATE, f"run={run}", "settings.prompts=[]")
    assert done == Finished(2, "", "error: settings.prompts=[]: expected one prompt or more\n")
    assert not list(here.iterdir())


def test_a_file_in_the_place_of_the_folder(capfd, here: Path, run: Path) -> None:
    (here / "taken").write_text("")
    for to, in_the_way in (("taken", "taken"), ("taken/below", "taken")):
        done = run_here(capfd, *EVALUATE, f"run={run}", f"to={to}")
        line = f"to={to}: {in_the_way} is a file; choose another folder with to=<folder>"
        assert done == Finished(2, "", f"error: {line}\n")


def test_a_model_that_cannot_be_loaded_leaves_nothing_behind(capfd, here: Path, run: Path) -> None:
    (here / "broken").mkdir()
    (here / "broken" / "config.json").write_text("{}")
    done = run_here(capfd, *EVALUATE, f"run={run}", "models.other=./broken")
    assert done.code == 2
    assert done.err.startswith("error: models.other.path=broken: cannot be loaded: ")
    assert done.err.count("\n") == 1
    assert [p.name for p in here.iterdir()] == ["broken"]


def test_a_run_without_an_evaluation(capfd, here: Path, copy: Path) -> None:
    config = (copy / "config.yaml").read_text()
    renamed = config.replace("stages.evaluate.Evaluate", "stages.other.Other")
    (copy / "config.yaml").write_text(renamed)
    done = run_here(capfd, *EVALUATE, f"run={copy}")
    assert done.code == 2
    assert done.err.startswith(
        f"error: run={copy}: the recipe word_kd has no stage that evaluates; its stages are "
    )
