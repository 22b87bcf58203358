"""A comparison published as a W&B Report: what the server is sent, and what it is not."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from commands import run_here
from fake_runs import make_run
from tracking.laid_runs import GROUP, STAGES, Put
from tracking.public_stub import PublicStub
from tracking.wandb_stub import ENTITY

from stillhouse.files import WANDB_URLS

PACKAGE = "wandb_workspaces"
SHOWN = ("markdown-block", "panel-grid")
PUBLISH = ("--config-name", "compare", "publish=true")


@pytest.fixture
def workspaces() -> None:
    """The package of the extra `report`."""
    pytest.importorskip(PACKAGE)


def put_settings(put: Put, temperatures: tuple[float, ...] = (1.0, 4.0)) -> None:
    """Lay a sweep over temperatures and two seeds on the server."""
    for temperature in temperatures:
        for seed in (0, 1):
            for stage in STAGES:
                put(
                    stage,
                    of=f"{temperature:g}-{seed}",
                    seed=seed,
                    method={"temperature": temperature},
                    config_hash=str(temperature),
                    overrides=[f"method.temperature={temperature:g}", f"seed={seed}"],
                )


def panels_of(grid: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return (kind, config) of a grid's charts."""
    panels = grid["metadata"]["panelBankSectionConfig"]["panels"]
    return [(panel["viewType"], panel["config"]) for panel in panels]


def sets_of(grid: dict[str, Any]) -> dict[str, set[str]]:
    """Return name -> ids of the W&B runs of a grid's sets."""
    return {
        runs["name"]: set(runs["filters"]["filters"][0]["value"])
        for runs in grid["metadata"]["runSets"]
    }


def test_a_report_has_the_tables_and_charts_over_the_runs(
    capfd, here: Path, server: PublicStub, put: Put, workspaces: None
) -> None:
    put_settings(put)
    done = run_here(capfd, *PUBLISH, f"runs={GROUP}", "baseline=teacher")
    assert done.code == 0, done.err
    assert done.err == ""
    assert server.unknown == []
    (report,) = server.reports
    assert (report["entityName"], report["projectName"]) == (ENTITY, "stillhouse")
    assert (report["type"], report["displayName"]) == ("runs", "Comparison of word_kd")
    address = f"{server.url}/{ENTITY}/stillhouse/reports/Comparison-of-word_kd--view1"
    assert done.out.endswith(f"published at W&B: {address}\n")

    blocks = {}
    for block in report["spec"]["blocks"]:
        blocks.setdefault(block["type"], []).append(block)
    (text,) = blocks["markdown-block"]
    page = (here / "compare" / "compare.md").read_text()
    assert text["content"] == page[: page.index("\n\n![")] + "\n"
    assert "| word_kd method.temperature=4 | student | 1.75 ± 0 (2) |" in text["content"]

    curves, charts = blocks["panel-grid"]
    settings = {"A word_kd temperature=1": "1", "B word_kd temperature=4": "4"}
    ids = {name: [f"{t}-{s}" for s in (0, 1)] for name, t in settings.items()}
    assert sets_of(curves) == {
        name: {f"{run}-{stage}" for run in runs for stage in STAGES} for name, runs in ids.items()
    }
    assert sets_of(charts) == {name: {f"{r}-evaluate" for r in runs} for name, runs in ids.items()}
    for runs in curves["metadata"]["runSets"]:
        assert runs["grouping"] == [{"section": "run", "name": "jobType"}]
    assert [(kind, c["xAxis"], c["metrics"]) for kind, c in panels_of(curves)] == [
        ("Run History Line Plot", "step", ["val_nll"]),
        ("Run History Line Plot", "step", ["train_loss"]),
    ]
    (_, coordinates), (_, scatter) = panels_of(charts)
    assert [c["accessor"] for c in coordinates["columns"]] == [
        "config:method.value.temperature",
        "summary:student/test_nll",
    ]
    assert scatter["xAxis"] == "summary:student/parameters"
    assert scatter["yAxis"] == "summary:student/test_nll"


def address(server: PublicStub, run: Path, project: str = "stillhouse") -> None:
    """Say that the last stage of a run directory was online."""
    url = f"{server.url}/{ENTITY}/{project}/runs/a-evaluate"
    (run / WANDB_URLS).write_text(json.dumps({"evaluate": url}))


def test_run_directories_are_published_in_the_project_in_which_they_were_online(
    capfd, here: Path, server: PublicStub, put: Put, workspaces: None
) -> None:
    put("evaluate")
    address(server, make_run(here / "online"))
    make_run(here / "offline", seed=1)
    assert run_here(capfd, *PUBLISH, "runs=[online,offline]").code == 0
    (report,) = server.reports
    assert report["projectName"] == "stillhouse"
    text, *grids = (b for b in report["spec"]["blocks"] if b["type"] in SHOWN)
    assert text["content"].endswith("in no chart below\n\n- offline\n")
    for grid in grids:
        assert sets_of(grid) == {"A word_kd": {"a-evaluate"}}


def test_without_a_project_nothing_is_published(
    capfd, here: Path, server: PublicStub, put: Put, workspaces: None
) -> None:
    put("evaluate")
    run = make_run(here / "run")
    done = run_here(capfd, *PUBLISH, "runs=run")
    assert done.code == 2
    assert done.err.startswith(
        "error: publish=true: no run of the comparison has an address at W&B, whose charts show "
        "W&B runs; send offline runs with `wandb sync"
    )
    # The client would make the project.
    address(server, run, "gone")
    done = run_here(capfd, *PUBLISH, "runs=run")
    assert done.code == 2
    assert done.err == (
        f"error: publish=true: {server.url} has no project {ENTITY}/gone that this API key may "
        "read; its address at W&B begins with entity and project\n"
    )
    assert server.unknown == []
    assert server.reports == []
    assert not (here / "compare").exists()


def test_what_the_server_refuses_to_save_is_told(
    capfd, here: Path, server: PublicStub, put: Put, workspaces: None, monkeypatch
) -> None:
    put("evaluate")
    address(server, make_run(here / "run"))
    monkeypatch.setattr(PublicStub, "_on_upsert_view", None)
    done = run_here(capfd, *PUBLISH, "runs=run")
    assert done.code == 2
    assert done.err.startswith(f"error: publish=true: {server.url} answers: ")
    assert (here / "compare" / "report.html").exists()


@pytest.mark.parametrize(
    ("lacking", "line"),
    [
        (
            "package",
            "a report at W&B needs the package wandb-workspaces; install it with: pip install "
            "-e '.[report]'",
        ),
        ("key", "there is no W&B API key; log in with `wandb login`, or set WANDB_API_KEY"),
        (
            "network",
            "W&B is offline here (WANDB_MODE, or `wandb offline`), and this asks its server; "
            "set the variable for this command: WANDB_MODE=online python run.py …",
        ),
    ],
)
def test_what_publishing_lacks_is_told_before_anything_is_read(
    capfd,
    here: Path,
    server: PublicStub,
    monkeypatch: pytest.MonkeyPatch,
    lacking: str,
    line: str,
) -> None:
    find = importlib.util.find_spec
    package = None if lacking == "package" else find("json")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: package if name == PACKAGE else find(name)
    )
    if lacking == "key":
        monkeypatch.delenv("WANDB_API_KEY")
    if lacking == "network":
        monkeypatch.setenv("WANDB_MODE", "offline")
    done = run_here(capfd, *PUBLISH, "runs=not there")
    assert done.code == 2
    assert done.err == f"error: publish=true: {line}\n"
