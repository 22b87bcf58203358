"""A recipe says which hidden states are compared with a node in place of a list."""

import shutil
from pathlib import Path

import pytest
from commands import ROOT
from hydra.utils import instantiate
from omegaconf import DictConfig

from stillhouse.config import preflight, signatures
from stillhouse.errors import UserError
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import Workspace, register_resolvers
from stillhouse.students.sharing import sharing_of, write_sharing

RECIPE = """
# @package _global_
defaults:
  - word_kd
  - _self_
  - override /method: echoatt
teacher:
  path: ${artifact:teacher}
  layers: ${stages.distil.family.layers}
stages:
  cache:
    teacher:
      layers: ${stages.distil.family.layers}
  distil:
    family:
      layers:
        _target_: stillhouse.students.sharing.group_ends
        sharing_path: ${artifact:teacher}
"""


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    folder = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    (folder / "experiment" / "shares.yaml").write_text(RECIPE)
    return folder


@pytest.fixture
def composed(conf: Path):
    def composed(*overrides: str) -> DictConfig:
        register_schemas()
        register_resolvers()
        config = preflight.compose_job(["experiment=shares", *overrides], conf)
        signatures.check(config, list(config.stages))
        return config

    return composed


@pytest.mark.parametrize("source", ["live", "cached"])
def test_family_teacher_and_cache_get_the_ends_of_the_groups(
    composed, source: str, tmp_path: Path, language_world, tiny_llama, stage_context
) -> None:
    workspace = Workspace(
        tmp_path, tmp_path / "cache", composed(f"teacher={source}", "codec=hidden")
    )
    shutil.copytree(language_world.model, workspace.artifact("teacher"))
    write_sharing(sharing_of([1], 2, key="followers"), workspace.artifact("teacher"))

    distil = instantiate(workspace.node("distil"), _recursive_=False, _convert_="all")
    module = instantiate(distil.family)(
        tiny_llama(), None, instantiate(distil.method), instantiate(distil.optimizer)
    )
    assert module.layers == (2,)

    data = language_world.data()
    if source == "cached":
        node = workspace.node("cache") | {"data": language_world.node()}
        context = stage_context("cache")
        instantiate(node, _recursive_=False, _convert_="all")(context)
        shutil.copytree(context.output, workspace.artifact("cache"))
    teacher = instantiate(distil.teacher)(data)
    batch = next(data.training_batches(range(3)))
    assert list(teacher(batch).layers) == [2]


def test_a_list_takes_the_place_of_an_interpolation(composed) -> None:
    assert composed("teacher.layers=[1]").stages.distil.teacher.layers == [1]
    assert composed("stages.distil.family.layers=null").teacher.layers is None


def test_a_number_is_no_list(composed) -> None:
    with pytest.raises(UserError) as refusal:
        composed("teacher.layers=1")
    assert str(refusal.value) == "teacher.layers=1: expected Sequence or null"


def test_a_key_that_the_node_s_target_does_not_take_is_refused(composed) -> None:
    with pytest.raises(UserError) as refusal:
        composed("+stages.distil.family.layers.sharing=x")
    assert str(refusal.value) == (
        "stages.distil.family.layers.sharing: group_ends takes no 'sharing'; it takes "
        "sharing_path; did you mean 'sharing_path'?"
    )
