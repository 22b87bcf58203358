"""ERNIE-Tiny's stages as the recipe composes them: one change a step, and what is left out."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from stillhouse.config import messages, preflight, signatures
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import Workspace, register_resolvers

STAGES = ("general", "general_enhanced", "task_adaptive", "task_specific")
RECIPES = ("ernie_tiny", "ernie_tiny_minilm", "ernie_tiny_paper")


def composed(recipe: str, *overrides: str) -> DictConfig:
    register_schemas()
    register_resolvers()
    return preflight.compose_job([f"experiment={recipe}", *overrides], ROOT / "conf")


def nodes(recipe: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """Return the four stages that are not left out, resolved."""
    config = composed(recipe, *overrides)
    workspace = Workspace(Path("run"), Path("cache"), config)
    return {stage: workspace.node(stage) for stage in STAGES if stage in workspace.stages}


def ingredients(node: dict[str, Any]) -> dict[str, Any]:
    """Return the three; a teacher is its model, whether it is run or was cached."""
    return {
        "teacher": node["teacher"]["path"],
        "data": node["data"],
        "loss": {key: node[key] for key in ("method", "family")},
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_consecutive_stages_differ_in_one_ingredient(recipe: str) -> None:
    found = [ingredients(node) for node in nodes(recipe).values()]
    changes = [
        [name for name in before if before[name] != after[name]]
        for before, after in pairwise(found)
    ]
    assert changes == [["teacher"], ["data"], ["loss"]]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_goes_on_from_the_one_before_and_compares_layers(recipe: str) -> None:
    found = nodes(recipe)
    assert [Path(n["student"]["path"]).name for n in found.values()] == ["untrained", *STAGES[:-1]]
    assert all(node["family"]["layer_map"] for node in found.values())
    forms = [node["method"]["latent_loss"] for node in found.values()]
    assert forms == [forms[0]] * len(STAGES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_without_a_fine_tuned_teacher_general_enhanced_is_more_general(recipe: str) -> None:
    untuned = nodes(recipe)["general"]["teacher"]["path"]
    found = nodes(recipe, f"teacher.path={untuned}")
    assert ingredients(found["general_enhanced"]) == ingredients(found["general"])


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("left_out", "goes_on_from"),
    [
        ((), "task_adaptive"),
        (("general_enhanced",), "task_adaptive"),
        (("task_adaptive",), "general_enhanced"),
        (("general_enhanced", "task_adaptive"), "general"),
        (("general", "general_enhanced", "task_adaptive"), "untrained"),
    ],
)
def test_the_last_stage_takes_the_steps_of_those_left_out(recipe, left_out, goes_on_from) -> None:
    found = nodes(recipe, f"leave_out=[{','.join(left_out)}]")
    assert Path(found["task_specific"]["student"]["path"]).name == goes_on_from
    steps = {stage: node["trainer"]["max_steps"] for stage, node in found.items()}
    whole = {stage: node["trainer"]["max_steps"] for stage, node in nodes(recipe).items()}
    kept = [stage for stage in STAGES[1:] if stage not in left_out]
    assert sum(steps[s] for s in kept) == sum(whole[s] for s in STAGES[1:])
    assert all(steps[s] == whole[s] for s in kept[:-1])


def test_more_steps_than_the_budget_are_refused() -> None:
    with pytest.raises(OmegaConfBaseException) as refused:
        nodes("ernie_tiny", "trainer.max_steps=100", "stages.task_adaptive.trainer.max_steps=90")
    assert messages.one_line(refused.value, [], ROOT / "conf") == (
        "trainer.max_steps=100: stages.general_enhanced.trainer.max_steps=25, "
        "stages.task_adaptive.trainer.max_steps=90 take more; it is the budget of these stages and "
        "the last one together: raise it, or lower theirs"
    )


@pytest.mark.parametrize("form", ["relation", "tinybert", "minilm"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_one_form_of_the_latent_loss_for_all_stages(recipe: str, form: str) -> None:
    config = composed(recipe, f"latent@method.latent_loss={form}")
    signatures.check(config, list(config.stages))
    found = nodes(recipe, f"latent@method.latent_loss={form}")
    forms = {node["method"]["latent_loss"]["_target_"] for node in found.values()}
    assert forms == {f"stillhouse.families.progressive.ernie_tiny.{form}"}


def test_tinybert_s_schedule() -> None:
    """Jiao et al. 1909.10351: general, then the task's layers, then its predictions alone."""
    found = nodes(
        "ernie_tiny",
        "latent@method.latent_loss=tinybert",
        "stages.general_enhanced=null",
        "stages.task_specific.family.projection=true",
        "method.latent_weight=0",
        "method.hard_weight=0",
    )
    assert list(found) == ["general", "task_adaptive", "task_specific"]
    general, adaptive, specific = (ingredients(node) for node in found.values())
    assert general["loss"] == adaptive["loss"]
    assert general["loss"]["family"]["projection"]
    assert (adaptive["teacher"], adaptive["data"]) == (specific["teacher"], specific["data"])
    weights = {k: v for k, v in found["task_specific"]["method"].items() if k.endswith("_weight")}
    assert weights == {"latent_weight": 0, "soft_weight": 1.0, "hard_weight": 0}
