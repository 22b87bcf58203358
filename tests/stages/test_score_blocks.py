"""The stage `score_blocks`: what it writes, draws, logs, says and refuses."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from hydra.utils import get_object
from omegaconf import OmegaConf
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from stillhouse.config import preflight, signatures
from stillhouse.errors import UserError
from stillhouse.evaluation.block_distances import block_scores
from stillhouse.records.block_scores import read_block_scores
from stillhouse.schema import register_schemas
from stillhouse.stages.score_blocks import ScoreBlocks
from stillhouse.stages.workspace import register_resolvers
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.tracking.tracker import FileTracker


class Logged(FileTracker):
    """Remembers what is logged, and that pictures were there."""

    def __init__(self) -> None:
        super().__init__(None)
        self.pictures: dict[str, bytes] = {}
        self.tables: dict[str, tuple[Sequence[str], Sequence[Sequence[Any]]]] = {}

    def picture(self, name: str, path: Path) -> None:
        self.pictures[name] = path.read_bytes()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        self.tables[name] = (columns, rows)


@pytest.fixture
def four_blocks(language_world: Any, tiny_llama: Any, tmp_path: Path) -> Path:
    """A model of four blocks with the tokenizer of the world."""
    model = tiny_llama(vocab_size=300, initializer_range=0.5, num_hidden_layers=4).float()
    model.save_pretrained(tmp_path / "four blocks")
    AutoTokenizer.from_pretrained(language_world.model).save_pretrained(tmp_path / "four blocks")
    return tmp_path / "four blocks"


def stage(world: Any, path: Path, **changes: Any) -> ScoreBlocks:
    settings: Mapping[str, Any] = {"path": str(path), "data": world.node(), "max_samples": 10}
    precision = {"dtype": "float32", "attn_implementation": "sdpa"}
    return ScoreBlocks(**(dict(settings) | precision | changes))


def test_scores_of_windows_spread_over_the_training_split(
    language_world, four_blocks, stage_context
):
    context = replace(stage_context("score_blocks"), tracker=Logged())
    # Documents of a few windows, of which the last is the shortest.
    node, data = (make(sequence_length=500) for make in (language_world.node, language_world.data))
    result = stage(language_world, four_blocks, data=node)(context)
    windows = data.windows("train").in_order()
    assert len(windows) > 10
    chosen = [windows[int(i * len(windows) / 10)] for i in range(10)]
    assert len({len(window.input_ids) for window in chosen}) > 1, "nothing is padded here"
    model = load_causal_lm(
        str(four_blocks), dtype="float32", attn_implementation="sdpa", key="teacher"
    )
    alone = [data.collate([window]) for window in chosen]
    expected = block_scores(model.eval(), alone, where="teacher")
    found = read_block_scores(str(context.output), key="path")
    torch.testing.assert_close(
        found.distances, expected.distances, rtol=0, atol=1e-5, equal_nan=True
    )
    assert found.influences == pytest.approx(expected.influences, abs=1e-5)
    assert found.magnitudes == expected.magnitudes
    assert result.metrics == {
        "samples": 10,
        "tokens": sum(len(window.input_ids) for window in chosen),
        "mean_block_influence": pytest.approx(sum(found.influences) / 4),
    }
    assert context.tracker.pictures == {
        "distances": (context.output / "distances.png").read_bytes()
    }
    assert context.tracker.pictures["distances"].startswith(b"\x89PNG")
    columns, rows = context.tracker.tables["least_distant_runs"]
    assert columns == ["n", "first_block", "distance"]
    assert [row[0] for row in rows] == [1, 2, 3]
    for n, start, distance in rows:
        assert distance == min(found.of_length(n)) == found.of_length(n)[start]
    assert "score_blocks: 10 of 10 samples" in context.console.file.getvalue()


def test_a_model_of_one_block_is_scored_and_drawn(language_world, tiny_llama, stage_context):
    """Nothing of it can go, which the stage `prune` says."""
    context = stage_context("score_blocks")
    folder = context.scratch / "one block"
    tiny_llama(vocab_size=300, num_hidden_layers=1).float().save_pretrained(folder)
    AutoTokenizer.from_pretrained(language_world.model).save_pretrained(folder)
    stage(language_world, folder)(context)
    assert read_block_scores(str(context.output), key="path").blocks == 1


def test_too_few_windows_are_all_taken(language_world, four_blocks, stage_context):
    result = stage(language_world, four_blocks, max_samples=10_000)(stage_context("score_blocks"))
    assert result.metrics["samples"] == len(language_world.data().windows("train"))


def test_no_sample_at_all(language_world, four_blocks, stage_context):
    node = language_world.node(max_train_documents=0)
    with pytest.raises(UserError) as refused:
        stage(language_world, four_blocks, data=node)(stage_context("score_blocks"))
    assert str(refused.value) == (
        "stages.score_blocks.data: the training split has no window; expected one sample at least"
    )


def test_a_model_whose_blocks_are_not_known(language_world, tmp_path, stage_context):
    config = OPTConfig(
        vocab_size=300, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(language_world.model).save_pretrained(tmp_path)
    with pytest.raises(UserError) as refused:
        stage(language_world, tmp_path)(stage_context("score_blocks"))
    assert str(refused.value) == (
        f"stages.score_blocks.path={tmp_path}: a model of the type opt; blocks can be left out of "
        "those of the type llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3_text, gpt2, gpt_neox"
    )


@pytest.mark.parametrize("pruning", sorted(p.stem for p in (ROOT / "conf/pruning").glob("*.yaml")))
def test_the_yaml_files_bind_and_list_every_parameter(pruning):
    register_schemas()
    register_resolvers()
    names = ["score_blocks", "prune"]
    added = [f"+stage@stages.{name}={name}" for name in names]
    added += ["stages.prune.choose=${pruning}"]
    chosen = [f"pruning={pruning}", *(["pruning.blocks=[1]"] if pruning == "given" else [])]
    config = preflight.compose_job(["experiment=word_kd", *added, *chosen], ROOT / "conf")
    OmegaConf.to_container(config, resolve=True)
    signatures.check(config, names)
    found = dict(signatures.nodes_with_targets(config, names))
    assert {"stages.score_blocks", "stages.score_blocks.data", "stages.prune", "pruning"} <= set(
        found
    )
    for path, node in found.items():
        if path.startswith(("stages", "pruning")):
            assert not set(signatures.keywords_of(get_object(node._target_)) or {}) - set(node)
