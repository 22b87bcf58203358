"""Nodes of encoders' recipes: every parameter is listed, and a callback of one stage alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from stillhouse.config import preflight, signatures
from stillhouse.errors import UserError
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import Workspace, register_resolvers

RECIPE = """
# @package _global_
defaults:
  - word_kd
  - /callbacks@stages.distil.own_callbacks.best: best_weights
  - _self_
"""
BEST = "stages.distil.own_callbacks.best"
GIVEN = (f"{BEST}.watched=val_nll", f"{BEST}.greater_is_better=false")


@pytest.mark.parametrize(
    "name",
    [
        "stage/encoder_tokenizer",
        "stage/cache_encoder",
        "teacher/cached_encoder",
        "callbacks/best_weights",
    ],
)
def test_a_node_lists_every_parameter(name: str) -> None:
    node: Any = OmegaConf.load(ROOT / f"conf/{name}.yaml")
    given = {str(key) for key in node} - {"_target_", "_partial_", "shared"}
    assert given == set(signatures.keywords_of(get_object(node["_target_"])) or {})


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    folder = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (folder / "experiment" / "watched.yaml").write_text(RECIPE)
    return folder


def compose(conf: Path, *overrides: str) -> DictConfig:
    register_schemas()
    register_resolvers()
    return preflight.compose_job(["experiment=watched", *overrides], conf)


def test_a_callback_of_one_stage_stands_beside_the_recipe_s(conf: Path) -> None:
    config = compose(conf, *GIVEN, "callbacks.checkpoint.checkpoint_every_n_steps=7")
    signatures.check(config, ["distil", "alone"])
    workspace = Workspace(conf, conf, config)
    distil, alone = workspace.node("distil"), workspace.node("alone")
    assert distil["own_callbacks"]["best"]["watched"] == "val_nll"
    assert alone["own_callbacks"] == {}
    for node in (distil, alone):
        assert node["callbacks"]["checkpoint"]["checkpoint_every_n_steps"] == 7
    before = workspace.fingerprint("distil")
    without = Workspace(conf, conf, compose(conf, "stages.distil.own_callbacks.best=null"))
    assert without.node("distil")["own_callbacks"] == {"best": None}
    assert without.fingerprint("distil") != before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            GIVEN[:1],
            f"{BEST}.greater_is_better has no value; set it with {BEST}.greater_is_better=<value>",
        ),
        ((*GIVEN, f"{BEST}.patience=0"), f"{BEST}.patience=0: expected 1 or more, or null"),
    ],
)
def test_its_values_are_checked_before_anything_runs(conf: Path, overrides, message: str) -> None:
    config = compose(conf, *overrides)
    with pytest.raises(UserError) as refused:
        signatures.check(config, ["distil"])
    assert str(refused.value) == message
