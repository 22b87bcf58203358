"""The contract of every recipe: it composes, binds, trains, resumes, exports, refuses typos."""

import json
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, only_run, run_here
from diffusers import DiffusionPipeline
from hydra.utils import get_object
from omegaconf import OmegaConf
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from stillhouse.config import preflight, signatures
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import register_resolvers

CONF = ROOT / "conf"
RECIPES = sorted(p.stem for p in (CONF / "experiment").glob("*.yaml"))
# Fifty methods must not lengthen the default suite: in it one recipe a family is run whole, of the
# family `timestep` one on points and one of phases, and one is cut in parts.
OF_A_FAMILY = ("word_kd", "echoatt", "ernie_tiny", "self_data", "scm_points", "rcm")


def run_whole(*in_default_suite: str) -> list:
    """Return all recipes but those that name models and data of a hub, or ask for a model."""
    return [
        pytest.param(recipe, marks=[] if recipe in in_default_suite else [pytest.mark.slow])
        for recipe in RECIPES
        if not recipe.endswith(("_paper", "_latents"))
    ]


def compose(recipe: str, *overrides: str):
    register_schemas()
    register_resolvers()
    return preflight.compose_job([f"experiment={recipe}", *overrides], CONF)


def load_student(folder: Path):
    """Load the product as what its config says it is: a model, or the network of a pipeline."""
    if (folder / "student" / "model_index.json").is_file():
        pipeline = DiffusionPipeline.from_pretrained(folder / "student", trust_remote_code=True)
        return pipeline.transformer
    (architecture,) = AutoConfig.from_pretrained(folder / "student").architectures
    language = architecture.endswith("ForCausalLM")
    auto = AutoModelForCausalLM if language else AutoModelForSequenceClassification
    return auto.from_pretrained(folder / "student")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_composes_and_says_what_it_is(recipe: str) -> None:
    config = compose(recipe)
    OmegaConf.to_container(config, resolve=True)
    assert config.recipe == recipe
    assert config.summary
    assert config.duration
    assert config.product is None or config.product in config.models


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_target_is_bound_and_every_parameter_listed(recipe: str) -> None:
    config = compose(recipe)
    stages = [name for name, node in config.stages.items() if node is not None]
    signatures.check(config, stages)
    for path, node in signatures.nodes_with_targets(config, stages):
        target = get_object(node._target_)
        if not getattr(target, "__module__", "").startswith("stillhouse"):
            continue
        missing = set(signatures.keywords_of(target) or {}) - set(node)
        assert not missing, f"{path} does not list {missing}"


@pytest.mark.parametrize("recipe", run_whole(*OF_A_FAMILY))
@pytest.mark.parametrize(
    "precision", ["32-true", pytest.param("bf16-mixed", marks=pytest.mark.slow)]
)
def test_a_recipe_takes_two_steps_and_exports(capfd, here: Path, recipe: str, precision) -> None:
    done = run_here(capfd, *TINY, f"experiment={recipe}", f"trainer.precision={precision}")
    assert done.code == 0, done.err
    folder = only_run(here / "outputs")
    results = json.loads((folder / "results.json").read_text())
    assert results["status"] == "done"
    assert {s["status"] for s in results["stages"].values()} <= {"done", "cached"}
    for numbers in results["models"].values():
        assert all(torch.isfinite(torch.tensor(float(v))) for v in numbers.values()), numbers
    product = OmegaConf.load(folder / "config.yaml").product
    student = load_student(folder)
    # A generator has a row for each number of steps.
    rows = [row for role, row in results["models"].items() if role.split("@")[0] == product]
    assert rows
    assert {row["parameters"] for row in rows} == {student.num_parameters()}
    if (folder / "student" / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(folder / "student")
        assert len(tokenizer) == student.config.vocab_size
    assert (folder / "pictures" / "loss.png").stat().st_size > 5000
    assert not (folder / "work").exists() or not list((folder / "work").iterdir())


@pytest.mark.parametrize("recipe", run_whole("word_kd"))
def test_a_recipe_goes_on_where_it_stopped(
    capfd, here: Path, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after its teacher and before its last stage: what is done is skipped, the rest done.

    The teacher stays what it is, and no checkpoint of what learns from it holds it.
    """
    from stillhouse.families.distiller import Distiller

    contents: list[set[str]] = []
    keep = Distiller.on_save_checkpoint

    def watch(self: Distiller, checkpoint: dict) -> None:
        keep(self, checkpoint)
        contents.append(set(checkpoint["state_dict"]))

    monkeypatch.setattr(Distiller, "on_save_checkpoint", watch)
    config = compose(recipe)
    stages = [name for name, node in config.stages.items() if node is not None]
    has_teacher = config.teacher is not None and "teacher" in stages
    command = (*TINY, f"experiment={recipe}")
    files: dict[Path, int] = {}
    teacher: dict[Path, bytes] = {}
    for stop in (["teacher"] if has_teacher else []) + [stages[-2], None]:
        done = run_here(capfd, *command, *([f"stop_after={stop}"] if stop else []))
        assert done.code == 0, done.err
        folder = only_run(here / "outputs")
        command = (f"resume={folder}", *TINY, f"experiment={recipe}")
        # A shared stage is a link to the cache.
        made = [p for stage in (folder / "stages").iterdir() for p in stage.rglob("*")]
        now = {p: p.stat().st_mtime_ns for p in made if p.is_file()}
        assert files.items() <= now.items(), "a stage that was done is done again"
        files = now
        if stop == "teacher":
            teacher = {p: p.read_bytes() for p in now if p.suffix == ".safetensors"}
            contents.clear()
    results = json.loads((folder / "results.json").read_text())
    # A shared stage that no other names is left out.
    left_out = [s for s in stages if s not in results["stages"]]
    assert all(config.stages[s].get("shared") for s in left_out)
    assert set(results["stages"]) == {s for s in stages if s not in left_out}
    assert results["status"] == "done"
    assert bool(teacher) == has_teacher
    assert {p: p.read_bytes() for p in teacher} == teacher
    assert contents, "no checkpoint was written"
    if has_teacher:
        assert not [name for names in contents for name in names if name.startswith("teacher")]


@pytest.mark.parametrize("recipe", RECIPES)
def test_an_unknown_key_is_refused_with_a_hint(capfd, here: Path, recipe: str) -> None:
    done = run_here(capfd, f"experiment={recipe}", "trainer.max_step=3")
    assert done.code == 2
    assert done.err == (
        "error: trainer.max_step: the config has no such key; did you mean 'trainer.max_steps' "
        "or 'trainer.max_time'?\n"
    )
