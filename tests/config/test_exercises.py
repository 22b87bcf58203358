"""A recipe that trains a seed model on exercises, lets it rewrite labels, and learns from them."""

import shutil
from pathlib import Path

import pytest
from commands import ROOT
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from stillhouse.config import preflight, signatures
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import register_resolvers

RECIPE = """
# @package _global_
defaults:
  - sft
  - /stage@stages.rewrite: rewrite
  - /stage@stages.train.data: rewritten
  - _self_
  - override /data: two_skills
  - override /decoding: greedy
  - override /teacher: hf
teacher:
  path: some/model
stages:
  rewrite:
    exercises: ${data.corpus.exercises}
    prompt: "{instruction} as {reference}"
"""
SUMS_ALONE = """
data:
  corpus:
    exercises:
      addition:
        style:
          _target_: stillhouse.data.tasks.two_skills.tens_then_units
        train_exercises: 30
        validation_exercises: 2
        test_exercises: 2
      reversal: null
      rewriting: null
"""

TASKS = ROOT / "platform/stillhouse/data/tasks"


@pytest.fixture
def composed(tmp_path: Path):
    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")

    def composed(*overrides: str, data: str = "") -> DictConfig:
        (conf / "experiment" / "rewrites.yaml").write_text(RECIPE + data)
        register_schemas()
        register_resolvers()
        config = preflight.compose_job(["experiment=rewrites", *overrides], conf)
        signatures.check(config, list(config.stages))
        return config

    return composed


@pytest.mark.parametrize(
    ("source", "overrides"),
    [
        ("two_skills", ()),
        ("reasoning_gym", ("+data.corpus.exercises.generators.leg_counting={}",)),
        ("answered_files", ("data.corpus.exercises.train_path=mine.jsonl",)),
        ("answered_hub", ("data.corpus.exercises.id=some/data",)),
        ("gsm8k", ()),
        ("alpaca", ()),
        ("dolly", ()),
    ],
)
def test_every_target_is_bound_and_every_parameter_listed(composed, source, overrides) -> None:
    config = composed(f"data={source}", *overrides)
    seen = set()
    for path, node in signatures.nodes_with_targets(config, list(config.stages)):
        target = get_object(node._target_)
        if not getattr(target, "__module__", "").startswith("stillhouse"):
            continue
        seen.add(target.__module__.removeprefix("stillhouse."))
        missing = set(signatures.keywords_of(target) or {}) - set(node)
        assert not missing, f"{path} does not list {missing}"
    module = source if (TASKS / f"{source}.py").is_file() else "answered_hub"
    assert {"stages.rewrite", "data.corpora.rewritten", f"data.tasks.{module}"} <= seen


def test_the_mixture_of_the_group_is_three_skills_and_a_recipe_takes_one_alone(composed) -> None:
    node = OmegaConf.load(ROOT / "conf/data/two_skills.yaml").corpus.exercises
    for skill in ("addition", "reversal", "rewriting"):
        node[skill].update(train_exercises=20, validation_exercises=2, test_exercises=2)
    mixture = instantiate(OmegaConf.to_container(node))
    assert {e.task for e in mixture.splits["train"]} == {"addition", "reversal", "rewriting"}

    config = composed(data=SUMS_ALONE)
    alone = instantiate(OmegaConf.to_container(config.data.corpus, resolve=True))
    documents = alone.documents("train")
    assert len(documents) == 30
    assert all("; " in document.messages[-1]["content"] for document in documents)


def test_the_phrases_that_give_the_wording_away_are_forbidden(composed) -> None:
    rewrite = OmegaConf.load(ROOT / "conf/stage/rewrite.yaml")
    assert rewrite.forbidden == [
        "reference answer",
        "your response",
        "my response",
        "your own response",
        "now it's your turn",
    ]
    assert rewrite.forbidden_start == "your turn"
    shown = rewrite.prompt.format(instruction="<asked>", reference="<label>")
    assert "### Instruction:\n<asked>\n\n### Reference Answer:\n<label>\n\n### Response:" in shown


def test_each_repair_on_smollm2_has_tasks_of_its_own_and_all_are_asked() -> None:
    """A node written over an interpolation keeps the keys of what that one names."""
    register_schemas()
    register_resolvers()
    config = preflight.compose_job(["experiment=self_data_smollm2"], ROOT / "conf")

    def asked(node) -> set[str]:
        return {n for n, settings in node.exercises.generators.items() if settings is not None}

    sums, products = {"chain_sum", "basic_arithmetic"}, {"products"}
    assert asked(config.data.corpus) == asked(config.stages.rewrite) == sums
    assert asked(config.stages.self_data.data.corpus) == sums
    assert asked(config.stages.rewrite_products) == products
    assert asked(config.stages.products.data.corpus) == products
    assert asked(config.evaluation) == sums | products
