"""The job `export`: a folder that plain `transformers` loads, and a card that tells the truth."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import Finished, run_here
from transformers import AutoModelForCausalLM, AutoTokenizer

from stillhouse.tracking.report import format_number

EXPORT = ("--config-name", "export")
PLAIN = """
import sys
sys.modules["stillhouse"] = sys.modules["stillhouse_kernels"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained({0!r}), AutoModelForCausalLM.from_pretrained({0!r})
ids = tokenizer("In the beginning God created", return_tensors="pt")["input_ids"]
torch.save(model.eval()(ids).logits, {1!r})
"""


def split_card(folder: Path) -> tuple[dict[str, Any], str]:
    """Return the front matter and the body of a card."""
    empty, head, body = (folder / "README.md").read_text().split("---\n", 2)
    assert empty == ""
    return yaml.safe_load(head), body


def test_plain_transformers_loads_it_and_computes_the_same(
    capfd, here: Path, run: Path, tmp_path: Path
) -> None:
    done = run_here(capfd, *EXPORT, f"run={run}", "to=home")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"home: the student of {run}, an ordinary model folder\n")
    assert [p.name for p in here.iterdir()] == ["home"]
    names = {p.name for p in (run / "student").iterdir()} | {"README.md"}
    assert {p.name for p in (here / "home").iterdir()} == names
    logits = tmp_path / "logits.pt"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", PLAIN.format(str(here / "home"), str(logits))],
        cwd=tmp_path,
        env=environment,
        check=True,
    )
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    model = AutoModelForCausalLM.from_pretrained(run / "student").eval()
    ids = tokenizer("In the beginning God created", return_tensors="pt")["input_ids"]
    assert torch.equal(torch.load(logits), model(ids).logits)


def test_the_card_holds_the_runs_numbers_and_where_the_model_comes_from(
    capfd, here: Path, run: Path
) -> None:
    assert run_here(capfd, *EXPORT, f"run={run}").code == 0
    head, body = split_card(here / "export")
    assert head == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "other",
        "tags": ["distillation", "stillhouse"],
    }
    results = json.loads((run / "results.json").read_text())
    roles = list(results["models"])
    assert f"| metric | unit | {' | '.join(roles)} |" in body
    rows = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows[2:]}
    for place, role in enumerate(roles):
        for metric, value in results["models"][role].items():
            assert table[metric][1 + place] == format_number(value)
    assert table["test_nll"][0] == "nats a token"
    assert all(row[0] for row in table.values()), "a metric without a unit"
    for line in (
        "- stages: `tokenizer` → `teacher` → `distil`; `distil` made it",
        "    - steps: 2",
        f"    - tokens seen: {results['stages']['distil']['metrics']['tokens_seen']}",
        "- command: `python run.py debug=tiny tracking=csv paths.outputs=outputs "
        "experiment=word_kd`",
        "- made by the run's own stage `teacher`, 25,120 parameters",
        "- King James Bible, licence: public domain",
        "- teacher: made by the run's own stage `teacher`, from what is listed here",
    ):
        assert line in body.splitlines()
    assert "word_kd.word_kd` with divergence=forward_kl, " in body
    assert "takes over the obligations of its teacher and of its data" in body


def test_another_role_has_a_card_of_its_own(capfd, here: Path, run: Path) -> None:
    done = run_here(capfd, *EXPORT, f"run={run}", "role=teacher", "licence=apache-2.0")
    assert done.code == 0, done.err
    head, body = split_card(here / "export")
    assert head["license"] == "apache-2.0"
    assert head["tags"] == ["stillhouse"], "nobody taught the teacher"
    assert "Its owner gave this model the licence `apache-2.0`." in body
    assert "- None: this model was trained without a teacher." in body
    assert "- stages: `tokenizer` → `teacher`; `teacher` made it" in body
    names = {p.name for p in (here / "export").iterdir()}
    assert {"model.safetensors", "tokenizer.json", "README.md"} <= names
    assert not {"manifest.json", "metrics.csv"} & names


def test_a_teacher_of_the_hub_is_named_and_is_nothing_to_export(
    capfd, here: Path, copy: Path
) -> None:
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["models"]["teacher"] = "some/model"
    for stage in ("distil", "alone"):
        config["stages"][stage]["data"]["tokenizer_path"] = "some/model"
    config["stages"]["distil"]["teacher"]["path"] = "some/model"
    (copy / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    assert run_here(capfd, *EXPORT, f"run={copy}").code == 0
    head, body = split_card(here / "export")
    assert head["base_model"] == ["some/model"]
    assert "distillation" in head["tags"]
    link = "[some/model](https://huggingface.co/some/model)"
    assert f"- {link}" in body.splitlines()
    assert f"- teacher: {link}. The run does not record its licence." in body
    done = run_here(capfd, *EXPORT, f"run={copy}", "role=teacher", "to=other")
    assert done == Finished(
        2,
        "",
        "error: role=teacher: its model some/model comes from outside the run, there is nothing to "
        "export; expected student_alone or student\n",
    )


def test_a_place_that_is_taken(capfd, here: Path, run: Path) -> None:
    (here / "full").mkdir()
    (here / "full" / "x").write_text("mine")
    (here / "file").write_text("mine")
    (here / "link").symlink_to("nowhere")
    for to in ("full", "link", "."):
        done = run_here(capfd, *EXPORT, f"run={run}", f"to={to}")
        assert done == Finished(
            2,
            "",
            f"error: to={to}: there is something already; expected a folder that is new or empty; "
            "choose another with to=<folder>\n",
        )
    done = run_here(capfd, *EXPORT, f"run={run}", "to=file/below")
    line = "to=file/below: file is a file; choose another folder with to=<folder>"
    assert done == Finished(2, "", f"error: {line}\n")
    assert sorted(p.name for p in here.iterdir()) == ["file", "full", "link"]
    assert [p.name for p in (here / "full").iterdir()] == ["x"]
    (here / "empty").mkdir()
    assert run_here(capfd, *EXPORT, f"run={run}", "to=empty").code == 0


def test_a_copy_that_breaks_off_leaves_nothing(
    capfd, here: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_off(source: Path, target: Path, **_: Any) -> None:
        target.mkdir()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", break_off)
    done = run_here(capfd, *EXPORT, f"run={run}", "to=home")
    assert done == Finished(
        2,
        "",
        "error: to=home: cannot be written: No space left on device; choose another folder with "
        "to=<folder>\n",
    )
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        (
            "role=techer",
            "role=techer: the run has no such model; its models are teacher, student_alone, "
            "student; did you mean 'teacher'?",
        ),
        ("license=mit", "license: the config has no such key; did you mean 'licence'?"),
    ],
)
def test_bad_values(capfd, here: Path, run: Path, argument: str, line: str) -> None:
    done = run_here(capfd, *EXPORT, f"run={run}", argument)
    assert done == Finished(2, "", f"error: {line}\n")
    assert not list(here.iterdir())


def test_a_recipe_without_a_product(capfd, here: Path, copy: Path) -> None:
    config = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(config.replace("product: student", "product: null"))
    done = run_here(capfd, *EXPORT, f"run={copy}")
    assert done == Finished(
        2,
        "",
        "error: role: the recipe word_kd names no product; choose a model with role=<role>; its "
        "models are teacher, student_alone, student\n",
    )
