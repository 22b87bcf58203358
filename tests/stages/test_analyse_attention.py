"""The stages `analyse` and `sharing`: what they write, log, say and refuse."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from hydra.utils import get_object
from omegaconf import OmegaConf

from stillhouse.config import preflight, signatures
from stillhouse.errors import UserError
from stillhouse.evaluation.attention_similarity import attention_similarity
from stillhouse.records.similarity import Similarity, read_similarity, write_similarity
from stillhouse.schema import register_schemas
from stillhouse.stages.analyse_attention import AnalyseAttention
from stillhouse.stages.choose_followers import ChooseFollowers
from stillhouse.stages.workspace import register_resolvers
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.students.sharing import read_sharing
from stillhouse.tracking.tracker import FileTracker

CHOICES = "stillhouse.students.follower_choices"


class Pictures(FileTracker):
    """Remembers the pictures that are logged, and that they were there."""

    def __init__(self) -> None:
        super().__init__(None)
        self.logged: dict[str, bytes] = {}

    def picture(self, name: str, path: Path) -> None:
        self.logged[name] = path.read_bytes()


def watched(context: Any) -> Any:
    return replace(context, tracker=Pictures())


def analyse(world, **changes) -> AnalyseAttention:
    settings = {"path": str(world.model), "data": world.node(), "max_windows": 5}
    return AnalyseAttention(**(settings | {"dtype": "float32"} | changes))


def choose(folder: Path, choice: str, **settings) -> ChooseFollowers:
    node = {"_target_": f"{CHOICES}.{choice}", "_partial_": True, **settings}
    return ChooseFollowers(analysis_path=str(folder), choose=node)


def test_the_similarity_on_full_windows_is_written_and_drawn(language_world, stage_context):
    context = watched(stage_context("analyse"))
    result = analyse(language_world)(context)
    windows = [w.input_ids for w in language_world.data().windows("train").in_order()]
    full = [ids for ids in windows if len(ids) == 24]
    assert 5 < len(full) < len(windows)
    spread = [full[int(i * len(full) / 5)] for i in range(5)]
    model = load_causal_lm(
        str(language_world.model), dtype="float32", attn_implementation="sdpa", key="teacher"
    )
    expected = attention_similarity(model.eval(), spread, where="teacher")
    found = read_similarity(str(context.output), key="path")
    assert torch.equal(found.matrix, expected.matrix)
    assert result.metrics == {
        "windows": 5,
        "tokens": 5 * 24,
        "mean_similarity": pytest.approx(float(expected.matrix[0, 1])),
    }
    assert set(context.tracker.logged) == {"similarity", "scores"}
    for name, content in context.tracker.logged.items():
        assert content == (context.output / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
    assert "analyse: 5 of 5 windows" in context.console.file.getvalue()


def test_too_few_windows_are_all_taken(language_world, stage_context):
    context = stage_context("analyse")
    result = analyse(language_world, max_windows=10_000)(context)
    spans = language_world.data().windows("train").spans
    full = sum(stop - start == 24 for start, stop in spans)
    assert result.metrics["windows"] == full
    assert json.loads((context.output / "similarity.json").read_text())["windows"] == full


def test_no_window_is_full(language_world, stage_context):
    with pytest.raises(UserError) as refused:
        analyse(language_world, data=language_world.node(sequence_length=100_000))(
            stage_context("analyse")
        )
    assert str(refused.value) == (
        "stages.analyse.data.sequence_length=100000: no training window has so many tokens; lower "
        "it, or set data.packing=true, so that windows run across documents"
    )


def test_a_refused_model_is_named(language_world, stage_context, tmp_path, tiny_llama):
    folder = tmp_path / "one layer"
    tiny_llama(vocab_size=300, num_hidden_layers=1).float().save_pretrained(folder)
    for file in language_world.model.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError) as refused:
        analyse(language_world, path=str(folder))(stage_context("analyse"))
    assert str(refused.value) == (
        f"stages.analyse.path={folder}: the model has one layer; expected two or more, to compare "
        "them"
    )


@pytest.fixture
def analysis(tmp_path: Path) -> Path:
    """The analysis of six layers: 2, 3 and 4 are alike."""
    matrix = torch.full((6, 6), 0.2, dtype=torch.float64)
    matrix[2:5, 2:5] = 0.9
    folder = tmp_path / "analysis"
    folder.mkdir()
    write_similarity(Similarity(matrix.fill_diagonal_(1.0), 3, 72), folder)
    return folder


@pytest.mark.parametrize(
    ("choice", "settings", "leaders", "words"),
    [
        ("most_similar", {"fraction": 0.33}, [0, 1, 1, 1, 4, 5], "layer 1 leads 2, 3"),
        ("largest_gap", {"group_size": None}, [0, 1, 2, 2, 2, 5], "layer 2 leads 3, 4"),
        (
            "given",
            {"followers": [5, 1]},
            [0, 0, 2, 3, 4, 4],
            "layer 0 leads 1; layer 4 leads 5",
        ),
        ("given", {"followers": []}, [0, 1, 2, 3, 4, 5], "no layer follows another"),
    ],
)
def test_a_choice_is_written_drawn_and_said(
    analysis, stage_context, choice, settings, leaders, words
):
    context = watched(stage_context("sharing"))
    result = choose(analysis, choice, **settings)(context)
    sharing = read_sharing(str(context.output), key="path")
    assert sharing.leaders == tuple(leaders)
    followers = sum(leader != layer for layer, leader in enumerate(leaders))
    assert result.metrics == {
        "layers": 6,
        "followers": followers,
        "shared_fraction": followers / 6,
    }
    assert context.tracker.logged == {"sharing": (context.output / "sharing.png").read_bytes()}
    assert context.console.file.getvalue() == f"sharing: {words}\n"


def test_the_order_of_a_given_list_is_kept(analysis, stage_context):
    context = stage_context("sharing")
    choose(analysis, "given", followers=[5, 1, 3])(context)
    assert read_sharing(str(context.output), key="path").order == (5, 1, 3)


def test_a_given_layer_that_is_not_there(analysis, stage_context):
    with pytest.raises(UserError) as refused:
        choose(analysis, "given", followers=[9])(stage_context("sharing"))
    assert str(refused.value) == (
        "sharing.followers=[9]: there is no layer 9; the model has the layers 0 to 5"
    )


def test_no_analysis_to_read(tmp_path, stage_context):
    with pytest.raises(UserError) as refused:
        choose(tmp_path, "most_similar", fraction=0.5)(stage_context("sharing"))
    assert str(refused.value) == (
        f"stages.sharing.analysis_path={tmp_path}: no similarity of layers can be read from "
        "similarity.json; expected what the stage `analyse` wrote"
    )


@pytest.mark.parametrize("sharing", sorted(p.stem for p in (ROOT / "conf/sharing").glob("*.yaml")))
def test_the_yaml_files_bind_and_list_every_parameter(sharing):
    register_schemas()
    register_resolvers()
    added = ["+stage@stages.analyse=analyse_attention", "+stage@stages.sharing=choose_followers"]
    added += ["stages.sharing.choose=${sharing}", "student=shared_attention"]
    chosen = [f"sharing={sharing}", *(["sharing.followers=[1]"] if sharing == "given" else [])]
    config = preflight.compose_job(["experiment=word_kd", *added, *chosen], ROOT / "conf")
    OmegaConf.to_container(config, resolve=True)
    signatures.check(config, ["analyse", "sharing"])
    found = dict(signatures.nodes_with_targets(config, ["analyse", "sharing"]))
    assert {"stages.analyse", "stages.analyse.data", "stages.sharing", "sharing"} <= set(found)
    for path, node in found.items():
        if path.startswith(("stages", "sharing")):
            assert not set(signatures.keywords_of(get_object(node._target_)) or {}) - set(node)
