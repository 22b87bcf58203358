"""The files for `wandb sweep`: W&B's schema, and keys, values and metrics that the recipe has."""

import csv
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROOT, TINY, only_run, run_here
from tracking.sweep_stub import engine
from wandb.sdk.launch.sweeps import utils

from stillhouse.config import preflight, signatures
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import register_resolvers

FILES = sorted((ROOT / "conf/wandb_sweep").glob("*.yaml"))


def loaded(file: Path) -> dict[str, Any]:
    """Return a sweep."""
    return yaml.safe_load(file.read_text())


def words_of(config: dict[str, Any]) -> list[str]:
    """Return what the command says of itself, without what the agent fills in."""
    return [word for word in config["command"] if not word.startswith("${")]


def swept_stage(config: dict[str, Any]) -> str:
    (word,) = (w for w in words_of(config) if w.startswith("tracking.sweep_stage="))
    return word.partition("=")[2]


def ends(parameter: dict[str, Any]) -> list[Any]:
    """Return the values of a parameter, or the ends of its range."""
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


def test_there_is_one_of_each_kind() -> None:
    assert {"grid", "bayes"} <= {loaded(file)["method"] for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_schema_of_wandb(file: Path) -> None:
    assert engine().schema_violations_from_proposed_config(loaded(file)) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_program_and_command(file: Path) -> None:
    config = loaded(file)
    assert (ROOT / config["program"]).is_file()
    filled = ["${env}", "${interpreter}", "${program}", *words_of(config), "${args_no_hyphens}"]
    assert config["command"] == filled


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_recipe_has_the_keys_and_takes_the_values(file: Path) -> None:
    register_schemas()
    register_resolvers()
    config = loaded(file)
    for key, parameter in config["parameters"].items():
        for value in ends(parameter):
            # As the agent writes them.
            args = utils.create_sweep_command_args({"args": {key: {"value": value}}})
            words = [*words_of(config), *args["args_no_hyphens"]]
            composed = preflight.compose_job(words, ROOT / "conf")
            stages = [name for name, node in composed.stages.items() if node is not None]
            assert swept_stage(config) in stages
            signatures.check(composed, [str(s) for s in stages])


def test_the_swept_stage_logs_the_metric(capfd, here: Path) -> None:
    logged: dict[str, set[tuple[str, str]]] = {}
    for config in map(loaded, FILES):
        (experiment,) = (w for w in words_of(config) if w.startswith("experiment="))
        if experiment not in logged:
            outputs = here / experiment.partition("=")[2]
            done = run_here(capfd, *TINY, f"paths.outputs={outputs}", experiment)
            assert done.code == 0, done.err
            with (only_run(outputs) / "metrics.csv").open() as rows:
                logged[experiment] = {(row["stage"], row["metric"]) for row in csv.DictReader(rows)}
        assert (swept_stage(config), config["metric"]["name"]) in logged[experiment]
