"""Recipes on pipelines of the hub, as they run: on tiny pipelines of the same kinds."""

import json
from pathlib import Path

import pytest
import saved_pictures
from commands import TINY, only_run, run_here, run_process
from hub_pipelines import PIPELINES, TOKENS

RECIPES = {
    "scm_paper": ("sana", "SanaTransformer2DModel", {"1", "2", "4"}),
    "sana_sprint_paper": ("sana", "SanaTransformer2DModel", {"1", "2", "4"}),
    "rcm_paper": ("wan", "WanTransformer3DModel", {"1", "2", "4"}),
    "dmd2_paper": ("stable_diffusion", "UNet2DConditionModel", {"1"}),
    "swiftbrush_paper": ("stable_diffusion", "UNet2DConditionModel", {"1"}),
}
SMALLER = (
    "stages.teacher.path=./pipeline",
    f"stages.captions.max_tokens={TOKENS}",
    "data.source.id=./rows",
    "data.source.caption_key=text",
    "data.source.image_size=16",
    "data.source.validation=2",
    "data.source.test=4",
)
ALONE = ("trainer=default", "trainer.devices=1")
# Of 28 blocks two are left.
FEATURES = ("stages.distil.family.discriminator.features=[network.model.transformer_blocks.1]",)


@pytest.fixture
def rows(here: Path) -> Path:
    saved_pictures.save()
    return here


# torch's own, of Wan's norms under autocast.
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_all_stages_run(capfd, rows: Path, recipe: str) -> None:
    kind, network, steps = RECIPES[recipe]
    (rows / "pipeline").mkdir()
    PIPELINES[kind](rows / "pipeline")
    more = FEATURES if recipe == "sana_sprint_paper" else ()
    done = run_here(capfd, *TINY, f"experiment={recipe}", *SMALLER, *ALONE, *more)
    assert done.code == 0, done.err
    folder = only_run(rows / "outputs")
    results = json.loads((folder / "results.json").read_text())
    assert {stage["status"] for stage in results["stages"].values()} == {"done"}
    rows_of_student = {role for role in results["models"] if role.startswith("student@")}
    assert rows_of_student == {f"student@{count}" for count in steps}
    index = json.loads((folder / "student" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", network]
    drawn = run_here(
        capfd,
        "--config-name",
        "sample",
        f"run={folder}",
        "prompts=[picture 1]",
        "num_inference_steps=1",
    )
    assert drawn.code == 0, drawn.err


@pytest.mark.slow
def test_a_network_of_the_hub_is_shared_over_ranks(rows: Path) -> None:
    """Tangents and turns of a network whose blocks have lists of their own, by the own trainer."""
    (rows / "pipeline").mkdir()
    PIPELINES["sana"](rows / "pipeline")
    more = (*FEATURES, "trainer.devices=2", "stop_after=distil")
    done = run_process(
        *TINY, "experiment=sana_sprint_paper", *SMALLER, *more, folder=rows, cache=rows / "cache"
    )
    assert done.code == 0, done.err
