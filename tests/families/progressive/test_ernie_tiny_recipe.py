"""ERNIE-Tiny's stages as the recipe composes them: one change a step, and what is left out."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT, TINY, only_run, run_here
from encoder_recipes import RECIPES, STAGES, composed, workspace_of
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException

from stillhouse.config import messages, signatures


def nodes(recipe: str, *overrides: str) -> dict[str, dict[str, Any]]:
    """Return the four stages that are not left out, resolved."""
    workspace = workspace_of(recipe, *overrides)
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
    kept = [stage for stage in STAGES if stage not in left_out]
    assert list(steps) == kept
    assert sum(steps.values()) == sum(whole.values())
    assert all(steps[s] == whole[s] for s in kept[:-1])


def test_the_paper_s_stages_on_a_task_s_texts_take_the_card_s_epochs() -> None:
    """Nine tenths of RTE's 2,490 texts and of MRPC's 3,668 are trained on."""
    found = nodes("ernie_tiny_paper")
    for texts in (2490, 3668):
        for stage, fewest, most in (("task_adaptive", 10, 20), ("task_specific", 3, 10)):
            node = found[stage]
            epochs = node["trainer"]["max_steps"] * node["data"]["batch_size"] / (0.9 * texts)
            assert fewest <= epochs <= most
    on_labels = composed("ernie_tiny_paper").stages.finetuned.trainer.max_steps
    assert on_labels == sum(found[s]["trainer"]["max_steps"] for s in STAGES[2:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_teacher_of_any_task_is_chosen_by_its_main_score(recipe: str) -> None:
    best = composed(recipe).stages.teacher.own_callbacks.best
    assert (best.watched, best.greater_is_better) == ("val_score", True)


SEVERAL = (
    "data=labelled_files",
    "data.corpus.train_path=mine.jsonl",
    "data.corpus.names=[odd,sad]",
    "data.corpus.kind=multi_label",
)


@pytest.mark.parametrize(
    ("data", "score"), [(("data=sentiment_scores",), "val_pearson"), (SEVERAL, "val_f1")]
)
def test_a_teacher_learns_numbers_or_several_labels(capfd, here: Path, data, score: str) -> None:
    lines = [
        {"text": f"film {i}", "label": [["sad"], ["odd", "sad"], []][i % 3]} for i in range(90)
    ]
    (here / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = run_here(capfd, *TINY, "experiment=ernie_tiny_minilm", *data, "stop_after=teacher")
    assert done.code == 0, done.err
    results = json.loads((only_run(here / "outputs") / "results.json").read_text())
    metrics = results["stages"]["teacher"]["metrics"]
    assert metrics["val_score"] == metrics[score]


@pytest.mark.parametrize("recipe", ["ernie_tiny", "ernie_tiny_minilm"])
def test_the_student_on_labels_alone_takes_as_many_steps_as_all_stages(recipe: str) -> None:
    total = sum(node["trainer"]["max_steps"] for node in nodes(recipe).values())
    assert composed(recipe).stages.finetuned.trainer.max_steps == total


def test_more_steps_than_the_budget_are_refused() -> None:
    with pytest.raises(OmegaConfBaseException) as refused:
        nodes("ernie_tiny", "trainer.max_steps=100", "stages.task_adaptive.trainer.max_steps=90")
    assert messages.one_line(refused.value, [], ROOT / "conf") == (
        "trainer.max_steps=100: stages.general.trainer.max_steps=300, "
        "stages.general_enhanced.trainer.max_steps=10, "
        "stages.task_adaptive.trainer.max_steps=90 take more; it is the budget of these stages and "
        "the last one together: raise it, or lower theirs"
    )


@pytest.mark.parametrize("debug", ["tiny", "fast", "overfit"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_stage_takes_the_few_steps_of_an_overlay(recipe: str, debug: str) -> None:
    most = {"tiny": 2, "fast": 2, "overfit": 200}[debug]
    steps = [node["trainer"]["max_steps"] for node in nodes(recipe, f"debug={debug}").values()]
    assert len(steps) == len(STAGES)
    assert all(1 <= n <= most for n in steps)


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
        "stages.task_specific.family.layer_map.embeddings=true",
        "method.latent_weight=0",
        "method.hard_weight=0",
    )
    assert list(found) == ["general", "task_adaptive", "task_specific"]
    general, adaptive, specific = (ingredients(node) for node in found.values())
    assert general["loss"] == adaptive["loss"]
    family = general["loss"]["family"]
    assert family["projection"]
    assert 0 in instantiate(family["layer_map"])(2, 6), "the embeddings are compared, too"
    assert (adaptive["teacher"], adaptive["data"]) == (specific["teacher"], specific["data"])
    weights = {k: v for k, v in found["task_specific"]["method"].items() if k.endswith("_weight")}
    assert weights == {"latent_weight": 0, "soft_weight": 1.0, "hard_weight": 0}


def test_the_layer_map_of_all_stages_is_chosen_in_the_last_one() -> None:
    found = nodes("ernie_tiny", "layer_map@stages.task_specific.family.layer_map=last")
    maps = {node["family"]["layer_map"]["_target_"] for node in found.values()}
    assert maps == {"stillhouse.students.layer_maps.last"}


@pytest.mark.parametrize(
    ("stage", "said", "told"),
    [
        ("general", "stages.<stage>.family.projection=false", "stages.task_specific.family."),
        ("cache_encoder", "stages.<stage>.layer_map", "stages.task_specific.family.layer_map"),
        ("teacher", "stages.<stage>.family.layer_map", "stages.teacher.family.layer_map"),
        (
            "task_specific",
            "layer_map@stages.<stage>.family.layer_map=uniform",
            "layer_map@stages.task_specific.family.layer_map=uniform",
        ),
    ],
)
def test_a_message_names_the_key_that_decides(stage: str, said: str, told: str) -> None:
    assert workspace_of("ernie_tiny").told(f"{said}: no", stage).startswith(told)


def test_a_list_that_is_no_layer_map_is_refused_by_the_first_stage_that_reads_it(
    capfd, here: Path
) -> None:
    given = "stages.task_specific.family.layer_map"
    done = run_here(
        capfd, *TINY, "experiment=ernie_tiny", f"layer_map@{given}=given", f"{given}.layers=[1,2]"
    )
    line = (
        f"{given}.layers=[1, 2]: expected pairs of a layer of the student and one of the teacher, "
        "say [[1, 3], [2, 6]]"
    )
    assert (done.code, done.err) == (2, f"error: {line}\n")
    results = json.loads((only_run(here / "outputs") / "results.json").read_text())
    assert results["stages"]["cache_encoder"]["error"] == f"UserError: {line}"
