"""The stage `prune`: the folder that it writes, what it says of it, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import CONFIGS, logits_passing_over, make
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

from stillhouse.errors import UserError
from stillhouse.records.block_scores import BlockScores, write_block_scores
from stillhouse.stages.prune import Prune

OUT = math.nan
DISTANCES = [
    [0.0, 0.3, 0.5, 0.2, 0.7],
    [0.0, 0.2, 0.1, 0.4, OUT],
    [0.0, 0.4, 0.6, OUT, OUT],
    [0.0, 0.1, OUT, OUT, OUT],
]


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    """Scores of four blocks: of runs of two 1 and 2 turn least, 0 and 2 alone have no influence."""
    folder = tmp_path / "scores"
    folder.mkdir()
    distances = torch.tensor(DISTANCES, dtype=torch.float64)
    record = BlockScores(distances, (0.1, 0.3, 0.0, 0.2), (4.0, 3.0, 2.0, 1.0), 1, 1)
    write_block_scores(record, folder)
    return folder


@pytest.fixture
def model(language_world: Any, tiny_llama: Any, tmp_path: Path) -> Path:
    """A model of four blocks in bfloat16, with its tokenizer."""
    folder = tmp_path / "model"
    full = tiny_llama(vocab_size=300, num_hidden_layers=4).bfloat16()
    full.generation_config.max_new_tokens = 7
    full.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(language_world.model)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(folder)
    return folder


def prune(model: Path, scores: Path, choice: str, **settings: Any) -> Prune:
    target = f"stillhouse.students.block_choices.{choice}"
    node = {"_target_": target, "_partial_": True, **settings}
    return Prune(path=str(model), scores_path=str(scores), choose=node)


def test_what_is_left_is_an_ordinary_folder_with_weights_as_they_were(model, scores, stage_context):
    context = stage_context("prune")
    result = prune(model, scores, "least_distant", n=2)(context)
    full = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    left = AutoModelForCausalLM.from_pretrained(context.output, dtype="auto")
    assert left.dtype == torch.bfloat16
    assert left.config.num_hidden_layers == 2
    assert left.generation_config.max_new_tokens == 7
    for new, old in enumerate([0, 3]):
        expected = full.model.layers[old].state_dict()
        torch.testing.assert_close(left.model.layers[new].state_dict(), expected, rtol=0, atol=0)
    assert torch.equal(left.lm_head.weight, full.lm_head.weight)
    theirs, ours = (AutoTokenizer.from_pretrained(folder) for folder in (model, context.output))
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.chat_template == theirs.chat_template
    assert json.loads((context.output / "pruned.json").read_text()) == {
        "dropped": [1, 2],
        "kept": [0, 3],
        "blocks": 4,
        "distance": 0.1,
    }
    inside = sum(p.numel() for p in full.model.layers[1].parameters())
    assert result.metrics == {
        "blocks": 2,
        "blocks_dropped": 2,
        "parameters": full.num_parameters() - 2 * inside,
        "parameters_removed": 2 * inside,
        "distance": 0.1,
    }
    assert context.console.file.getvalue() == "prune: 2 of 4 blocks dropped: 1, 2\n"


def test_blocks_that_are_no_run_have_no_distance(model, scores, stage_context):
    context = stage_context("prune")
    result = prune(model, scores, "least_influential", n=2)(context)
    assert json.loads((context.output / "pruned.json").read_text()) == {
        "dropped": [0, 2],
        "kept": [1, 3],
        "blocks": 4,
    }
    assert "distance" not in result.metrics


@pytest.mark.parametrize(
    ("choice", "settings", "dropped"),
    [
        ("least_magnitude", {"n": 2}, [2, 3]),
        ("given", {"blocks": [3, 0]}, [0, 3]),
        ("random_run", {"n": 3, "seed": 4}, [1, 2, 3]),
    ],
)
def test_other_choices(model, scores, stage_context, choice, settings, dropped):
    context = stage_context("prune")
    prune(model, scores, choice, **settings)(context)
    assert json.loads((context.output / "pruned.json").read_text())["dropped"] == dropped


@torch.no_grad()
@pytest.mark.parametrize("family", CONFIGS)
def test_models_of_every_family(family, language_world, tmp_path, stage_context):
    """Gemma 2 among them, which attends in one way only."""
    context = stage_context("prune")
    folder = tmp_path / "model"
    full = make(family)
    full.save_pretrained(folder)
    AutoTokenizer.from_pretrained(language_world.model).save_pretrained(folder)
    distances = [[0.0] + [0.5] * (6 - start) + [OUT] * start for start in range(6)]
    equal = (0.5,) * 6
    record = BlockScores(torch.tensor(distances, dtype=torch.float64), equal, equal, 1, 1)
    write_block_scores(record, tmp_path)
    result = prune(folder, tmp_path, "given", blocks=[2, 3])(context)
    left = AutoModelForCausalLM.from_pretrained(context.output, attn_implementation="eager")
    assert result.metrics["parameters"] == left.num_parameters()
    assert "attn_implementation" not in (context.output / "config.json").read_text()
    ids = torch.arange(2, 14).unsqueeze(0)
    expected = logits_passing_over(full, {2, 3}, ids)
    torch.testing.assert_close(left.double().eval()(ids).logits, expected)


def refusal(stage: Prune, context: Any) -> str:
    with pytest.raises(UserError) as refused:
        stage(context)
    assert not list(context.output.iterdir())
    return str(refused.value)


def test_more_blocks_than_can_go(model, scores, stage_context):
    assert refusal(prune(model, scores, "least_distant", n=4), stage_context("prune")) == (
        "stages.<stage>.choose.n=4: expected a number of blocks from 1 to 3, for the model has 4 "
        "and one must stay"
    )


def test_scores_of_another_model(language_world, scores, stage_context):
    stage = prune(language_world.model, scores, "least_distant", n=1)
    assert refusal(stage, stage_context("prune")) == (
        f"stages.prune.scores_path={scores}: scores of 4 blocks, the model has 2; expected those "
        "of the same model: score it anew"
    )


def test_no_scores(model, tmp_path, stage_context):
    assert refusal(prune(model, tmp_path, "least_distant", n=1), stage_context("prune")) == (
        f"stages.prune.scores_path={tmp_path}: no scores of blocks can be read from "
        "block_scores.json; expected what the stage `score_blocks` wrote"
    )


def test_no_model(scores, tmp_path, stage_context):
    missing = tmp_path / "missing"
    assert refusal(prune(missing, scores, "least_distant", n=1), stage_context("prune")) == (
        f"stages.prune.path={missing}: there is no such folder"
    )


def test_a_model_whose_blocks_are_not_known(scores, tmp_path, stage_context):
    folder = tmp_path / "opt"
    config = OPTConfig(
        vocab_size=300, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=2
    )
    OPTForCausalLM(config).save_pretrained(folder)
    assert refusal(prune(folder, scores, "least_distant", n=1), stage_context("prune")) == (
        f"stages.prune.path={folder}: a model of the type opt; blocks can be left out of those of "
        "the type llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gpt2, gpt_neox"
    )


def test_a_model_without_a_tokenizer(tiny_llama, scores, tmp_path, stage_context):
    folder = tmp_path / "bare"
    tiny_llama(num_hidden_layers=4).save_pretrained(folder)
    said = refusal(prune(folder, scores, "least_distant", n=1), stage_context("prune"))
    assert said.startswith(f"stages.prune.path={folder}: no tokenizer can be loaded: ")
