"""What a card says where the library, the task or the code is another."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.jobs.finished_run import FinishedRun
from stillhouse.jobs.model_card import front_matter, model_card
from stillhouse.jobs.origins import GENERATE, REWRITE, Origins, Source, origins_of

NOTHING = Origins("train", ["train"], ["train"], [], [], [], {})


@pytest.mark.parametrize(
    ("architecture", "library", "task"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "transformers", "text-generation"),
        ({"architectures": ["BertForMaskedLM"]}, "transformers", "fill-mask"),
        ({"architectures": ["BertModel"]}, "transformers", None),
        ({"_class_name": "DDPMPipeline"}, "diffusers", None),
    ],
)
def test_library_and_task_follow_the_architecture(architecture, library: str, task) -> None:
    head = front_matter(NOTHING, architecture, None)
    assert head["library_name"] == library
    assert head.get("pipeline_tag") == task
    assert head["tags"] == ["stillhouse"]


def origins(folder: Path, stages: dict[str, Any], stage: str) -> Origins:
    nodes = {name: {"_target_": "a.b", **node} for name, node in stages.items()}
    return origins_of(FinishedRun(folder, {"stages": nodes}, {}), stage)


def test_base_models_are_those_of_the_hub(tmp_path: Path) -> None:
    stages = {
        "train": {
            "teacher": {"members": {"a": {"path": "org/a"}, "b": {"path": str(tmp_path)}}},
            "student": {"path": "org/small"},
            "data": {"tokenizer_path": "org/a"},
        },
        "merge": {"models": ["stages/train"], "data": {"tokenizer_path": "org/words"}},
    }
    found = origins(tmp_path, stages, "merge")
    assert found.stages == ["train", "merge"]
    assert found.sources == [
        Source("teacher", "org/a", "hub"),
        Source("teacher", str(tmp_path), "folder"),
        Source("initial weights", "org/small", "hub"),
        Source("tokenizer", "org/words", "hub"),
    ]
    assert front_matter(found, {}, None)["base_model"] == ["org/a", "org/small"]


@pytest.mark.parametrize("stage", [GENERATE, REWRITE])
def test_a_teacher_may_teach_by_what_it_writes_and_come_out_of_a_package(
    tmp_path: Path, stage: str
) -> None:
    package = {"name": "words", "version": "1.2", "_target_": "a.pypi"}
    stages = {
        "package": {"package": package, "synthetic": False},
        "teacher": {"package_path": "stages/package"},
        "generate": {"_target_": stage, "path": "stages/teacher"},
        "train": {
            "student": {"_target_": "a.b", "path": "stages/teacher"},
            "data": {"generated_path": "stages/generate", "tokenizer_path": "stages/teacher"},
        },
    }
    for place in ("package/words", "teacher"):
        (tmp_path / "stages" / place).mkdir(parents=True)
        (tmp_path / "stages" / place / "LICENSE").write_text("be kind")
    found = origins(tmp_path, stages, "train")
    assert found.sources == [
        Source("teacher", "teacher", "stage"),
        Source("package", "words 1.2", "package"),
    ]
    assert list(found.licences) == ["licences/package/LICENSE"], "the same text twice"
    card = model_card(
        FinishedRun(
            tmp_path,
            {"recipe": "r", "summary": "s", "stages": stages},
            {"seed": 0, "models": {}, "stages": {}, "git": "abc", "overrides": []},
        ),
        "student",
        found,
        architecture={"architectures": ["GPT2LMHeadModel"]},
        licence=None,
    )
    text = (
        "- licence text of what was fetched: [licences/package/LICENSE](licences/package/LICENSE)"
    )
    assert text in card.splitlines()
    assert "- package: `words 1.2`. The run does not record its licence." in card
    assert "- distillation" in card


def test_data_without_a_licence_is_for_you_to_find_out(tmp_path: Path) -> None:
    corpora = [Corpus("Mine", "unknown", {}), Corpus("Theirs", "CC0-1.0", {})]
    card = model_card(
        FinishedRun(
            tmp_path,
            {"recipe": "r", "summary": "s", "stages": {"train": {}}},
            {"seed": 0, "models": {}, "stages": {}, "git": "abc", "overrides": []},
        ),
        "student",
        replace(NOTHING, corpora=corpora),
        architecture={},
        licence=None,
    )
    known, to_check = card.split("Known:")[1].split("To check before you share it:")
    assert "- data: Theirs, CC0-1.0" in known
    assert "Mine" not in known
    assert "- data: Mine. Its licence was not given." in to_check


def test_every_stage_that_trained_the_weights_is_told(tmp_path: Path) -> None:
    sft = {"_target_": "x.sft"}
    stages = {
        "teacher": {"method": sft, "student": {"_target_": "x.llama"}},
        "other": {"method": sft, "student": {"_target_": "x.llama"}},
        "cut": {
            "method": {"_target_": "x.echoatt", "soft_weight": 0.25},
            "teacher": {"path": "stages/other"},
            "student": {"_target_": "x.shared", "path": "stages/teacher"},
        },
        "train": {"method": sft, "student": {"_target_": "x.hf", "path": "stages/cut"}},
    }
    found = origins(tmp_path, stages, "train")
    assert found.weights == ["teacher", "cut", "train"]
    metrics = {"steps": 160, "tokens_seen": 4096, "train_loss": 1.0}
    results = {"models": {"student": {"decode_speedup_n512": 1.5}}}
    results |= {"seed": 0, "git": None, "overrides": [], "stages": {"cut": {"metrics": metrics}}}
    card = model_card(
        FinishedRun(tmp_path, {"recipe": "r", "summary": "s", "stages": stages}, results),
        "student",
        found,
        architecture={},
        licence=None,
    )
    assert "- its weights were trained by `teacher`, then `cut`, then `train`" in card
    assert (
        "- `cut`\n"
        "    - method: `x.echoatt` with soft_weight=0.25\n"
        "    - student: `x.shared` with path=stages/teacher\n"
        "    - steps: 160\n"
        "    - tokens seen: 4,096\n"
        "- `train`\n"
    ) in card
    assert "| decode_speedup_n512 | times as fast as the reference | 1.5 |" in card


def test_a_merge_comes_from_both_of_its_models(tmp_path: Path) -> None:
    sft = {"_target_": "x.sft"}
    slerp = {"_target_": "x.slerp", "weight": 0.5}
    stages = {
        "seed": {"method": sft, "student": {"_target_": "x.llama"}},
        "prune": {"path": "stages/seed"},
        "one": {"method": sft, "student": {"_target_": "x.lora", "path": "stages/prune"}},
        "two": {"method": sft, "student": {"_target_": "x.lora", "path": "org/pruned"}},
        "apart": {"method": sft, "student": {"path": "stages/prune"}},
        "merge": {"path": "stages/one", "other_path": "stages/two", "merging": slerp},
        "again": {"path": "stages/merge", "other_path": "org/third", "merging": slerp},
    }
    found = origins(tmp_path, stages, "again")
    assert found.stages == ["seed", "prune", "one", "two", "merge", "again"]
    assert found.weights == found.stages
    assert {source.name: source.kind for source in found.sources} == {
        "seed": "stage",
        "prune": "stage",
        "one": "stage",
        "two": "stage",
        "merge": "stage",
        "org/pruned": "hub",
        "org/third": "hub",
    }
    assert front_matter(found, {}, None)["base_model"] == ["org/pruned", "org/third"]
    results = {"models": {}, "seed": 0, "git": None, "overrides": [], "stages": {}}
    card = model_card(
        FinishedRun(tmp_path, {"recipe": "r", "summary": "s", "stages": stages}, results),
        "merged",
        found,
        architecture={},
        licence=None,
    )
    assert "- its weights were trained by `seed`, `one`, `two`\n" in card
    assert (
        "- `merge`\n"
        "    - models: stages/one, stages/two\n"
        "    - merging: `x.slerp` with weight=0.5\n"
        "- `again`\n"
        "    - models: stages/merge, org/third\n"
    ) in card
    for name in ("one", "two"):
        assert f"- initial weights: made by the run's own stage `{name}`" in card


def test_what_was_synthetic_is_said(tmp_path: Path) -> None:
    stages = {"package": {"package": {"name": "x", "version": "1"}, "synthetic": True}}
    found = origins(tmp_path, stages, "package")
    assert found.synthetic == ["package"]
    assert found.sources == []


def test_a_model_with_code_of_its_own_and_a_run_outside_git(tmp_path: Path) -> None:
    config = {"recipe": "r", "summary": "s", "stages": {"train": {"method": None}}, "models": {}}
    results = {"seed": 3, "models": {}, "stages": {}, "git": None, "overrides": ["a=b c"]}
    architecture = {"architectures": ["XForCausalLM"], "auto_map": {}}
    card = model_card(
        FinishedRun(tmp_path, config, results),
        "student",
        NOTHING,
        architecture=architecture,
        licence=None,
    )
    assert 'AutoModelForCausalLM.from_pretrained("<this folder>", trust_remote_code=True)' in card
    assert "- code: the git revision is not known, the code lay in no checkout" in card
    assert "- command: `python run.py 'a=b c'`" in card
    assert "- Nothing." in card
