"""What a sweep shares: stages that do not depend on what it runs over, and those that must."""

from functools import cache
from pathlib import Path

import pytest
from encoder_recipes import RECIPES, workspace_of

from stillhouse.config import signatures
from stillhouse.stages.runner import make_plan

CACHED = ("ernie_tiny", "ernie_tiny_minilm")
MAIN = (
    "optimizer.learning_rate=0.1",
    "optimizer.weight_decay=0.3",
    "optimizer.warmup_fraction=0.4",
    "trainer.max_steps=900000",
    "trainer.val_check_interval=7",
    "method.soft_weight=0",
    "leave_out=[general_enhanced]",
)
# Another task, of the kind that each recipe takes.
TASKS = {
    "ernie_tiny": "data.corpus.train_examples=2100",
    "ernie_tiny_minilm": "data=spam",
    "ernie_tiny_paper": "data.corpus.task=mrpc",
}
FORMS = (
    "latent@method.latent_loss=minilm",
    "stages.task_specific.family.projection=true",
    "layer_map@stages.task_specific.family.layer_map=last",
)


@cache
def prints(recipe: str, *overrides: str) -> dict[str, str]:
    """Return the fingerprints of a recipe's stages."""
    workspace = workspace_of(recipe, *overrides)
    return {stage: workspace.fingerprint(stage) for stage in workspace.stages}


def changed(recipe: str, *overrides: str) -> set[str]:
    """Return the stages that overrides have made anew."""
    before, after = prints(recipe), prints(recipe, *overrides)
    return {stage for stage in after if after[stage] != before[stage]}


@pytest.mark.parametrize("overrides", [MAIN, ("leave_out=[general_enhanced,task_adaptive]",)])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_the_four_stages_are_varied_in_leaves_what_they_share(recipe, overrides) -> None:
    shared = {"pretraining", "pretrained", "teacher", "cache_encoder", "untrained", "general"}
    made_anew = changed(recipe, *overrides)
    assert not made_anew & shared
    assert "task_specific" in made_anew


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_general_stage_is_one_for_all_tasks_and_label_counts(recipe: str) -> None:
    for override in (TASKS[recipe], "data.train_labels=50"):
        made_anew = changed(recipe, override)
        assert not made_anew & {"pretraining", "pretrained", "untrained", "general"}
        assert {"teacher", "general_enhanced", "task_adaptive", "task_specific"} <= made_anew


@pytest.mark.parametrize("recipe", RECIPES)
def test_seeds_share_teacher_and_signal_and_begin_with_students_of_their_own(recipe: str) -> None:
    made_anew = changed(recipe, "seed=7")
    assert not made_anew & {"tokenizer", "pretraining", "pretrained", "teacher", "cache_encoder"}
    assert {"untrained", "general", "task_specific"} <= made_anew
    assert ("cache_encoder" in prints(recipe)) == (recipe in CACHED)


@pytest.mark.parametrize("override", FORMS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_general_stage_is_another_where_layers_are_compared_otherwise(recipe, override) -> None:
    made_anew = changed(recipe, override)
    assert "general" in made_anew
    assert not made_anew & {"pretraining", "pretrained", "teacher", "untrained"}
    cached = "layer_map" in override and recipe in CACHED
    assert ("cache_encoder" in made_anew) == cached


@pytest.mark.parametrize("recipe", CACHED)
def test_the_signal_follows_the_student_s_depth_alone(recipe: str) -> None:
    depth = {
        "ernie_tiny": "student.num_hidden_layers=3",
        "ernie_tiny_minilm": "student.blocks=[0,5]",
    }
    assert "cache_encoder" in changed(recipe, depth[recipe])
    assert "cache_encoder" not in changed(recipe, "student.intermediate_size=96")


@pytest.mark.parametrize(
    ("recipe", "overrides", "layers"),
    [
        ("ernie_tiny", (), 2),
        ("ernie_tiny_minilm", (), 0.5),
        ("ernie_tiny_minilm", ("student=layer_drop",), 0.5),
        ("ernie_tiny_minilm", ("student=encoder",), 4),
        ("ernie_tiny_minilm", ("student=pretrained_encoder", "~student.blocks"), None),
    ],
)
def test_the_signal_is_told_the_student_s_depth_whatever_it_is_made_of(
    recipe, overrides, layers
) -> None:
    node = workspace_of(recipe, *overrides).node("cache_encoder")
    assert node["student_layers"] == layers


FETCHED = [
    ((), {"fetch_sentiment"}),
    (("data=sentiment_scores",), {"fetch_sentiment"}),
    (("data=spam",), {"fetch_spam"}),
    (("data=glue", "data.corpus.task=sst2"), set()),
    (("data@stages.general.data=wordnet_glosses",), {"fetch_sentiment", "fetch_wordnet"}),
    (("data@stages.general.data=python_docs",), {"fetch_sentiment", "fetch_python_docs"}),
    (
        ("data=spam", "data@stages.general.data=python_docs"),
        {"fetch_spam", "fetch_python_docs"},
    ),
    (
        (
            "data=labelled_files",
            "data.corpus.train_path=mine.jsonl",
            "data.corpus.names=[no,yes]",
            "data@stages.general.data=hub_pieces",
            "stages.general.data.corpus.id=some/text",
        ),
        set(),
    ),
]


@pytest.mark.parametrize(("overrides", "packages"), FETCHED)
def test_what_the_data_need_is_fetched_and_no_more(overrides, packages, tmp_path: Path) -> None:
    workspace = workspace_of("ernie_tiny_minilm", *overrides, folder=tmp_path)
    signatures.check(workspace.config, workspace.stages)
    plan = {step.stage: step.state for step in make_plan(workspace)}
    fetch = {stage for stage in plan if stage.startswith("fetch_")}
    assert len(fetch) == 5
    assert {s for s in plan if plan[s] == "not needed"} == fetch - packages - {"fetch_minilm"}
    assert {s for s in fetch if plan[s] == "run"} == packages | {"fetch_minilm"}


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("ernie_tiny", ("data@stages.pretraining.data=king_james_pieces",)),
        (
            "ernie_tiny",
            (
                "data=labelled_files",
                "data.corpus.train_path=mine.jsonl",
                "data.corpus.names=[no,yes]",
                "data.sequence_length=64",
                "data@stages.pretraining.data=king_james_pieces",
                "stages.pretraining.data.sequence_length=64",
                "stages.tokenizer.vocab_size=2000",
            ),
        ),
        (
            "ernie_tiny_paper",
            (
                "data=labelled_files",
                "data.corpus.train_path=mine.jsonl",
                "data.corpus.names=[no,yes]",
            ),
        ),
    ],
)
def test_other_recipes_take_other_data(recipe, overrides, tmp_path: Path) -> None:
    workspace = workspace_of(recipe, *overrides, folder=tmp_path)
    signatures.check(workspace.config, workspace.stages)
    assert {step.state for step in make_plan(workspace)} == {"run"}
