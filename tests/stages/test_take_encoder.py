"""An encoder out of a package: the model that lies in it, its licence, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import CONFIGS, LAYERS, POSITIONS, WIDTH, V, make, make_batch, make_tokenizer, save
from transformers import AutoModel, AutoTokenizer

from stillhouse.errors import UserError
from stillhouse.stages.take_encoder import TakeEncoder
from stillhouse.students.encoders import load_encoder, read_encoder

ARCHITECTURE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS,
}
SMALL = ARCHITECTURE | {"vocab_size": 200}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with one model and two licences, and a file that is none."""
    folder = tmp_path / "package"
    save(make("bert", None).float(), folder / "lib/model")
    # A sentence encoder's says how it cuts, and not how far it can go.
    tokenizer = make_tokenizer()
    tokenizer.model_max_length = 8
    tokenizer.save_pretrained(folder / "lib/model")
    (folder / "lib/LICENSE").write_text("Apache")
    (folder / "dist-info").mkdir()
    (folder / "dist-info/NOTICE.txt").write_text("of others")
    (folder / "lib/licensing.py").write_text("pass")
    return folder


@pytest.fixture
def take(package, stage_context):
    """A function that takes the model; returns its folder and the stage's metrics."""

    def take(**changes: Any) -> tuple[Path, Any]:
        context = stage_context("pretrained")
        settings = {
            "package_path": str(package),
            "folder": "lib/model",
            "architecture": ARCHITECTURE,
        }
        metrics = TakeEncoder(**(settings | changes))(context).metrics
        return context.output, metrics

    return take


@torch.no_grad()
def test_it_is_the_model_of_the_package_with_its_tokenizer(take) -> None:
    folder, metrics = take()
    taken = AutoModel.from_pretrained(folder, dtype="float64").eval()
    batch = make_batch()
    expected = read_encoder(make("bert", None).float().double(), batch, hidden_layers=[LAYERS])
    found = read_encoder(taken, batch, hidden_layers=[LAYERS])
    torch.testing.assert_close(found.hidden_states, expected.hidden_states)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == make_tokenizer().get_vocab()
    assert tokenizer.model_max_length == POSITIONS
    assert metrics == {"parameters": taken.num_parameters(), "vocab_size": V}


def test_licences_go_with_it(take) -> None:
    folder, _ = take()
    assert (folder / "LICENSE").read_text() == "Apache"
    assert (folder / "NOTICE.txt").read_text() == "of others"
    assert not (folder / "licensing.py").exists()


def test_a_head_is_left_behind(take, package) -> None:
    save(make("bert").float(), package / "lib/model")
    folder, _ = take()
    assert AutoModel.from_pretrained(folder).config.architectures == ["BertModel"]


def test_a_synthetic_one_reads_no_file(take, package) -> None:
    shutil.rmtree(package)
    torch.manual_seed(5)
    folder, metrics = take(synthetic=True, architecture=SMALL)
    torch.manual_seed(6)
    weights = AutoModel.from_pretrained(folder).state_dict()
    again, _ = take(synthetic=True, architecture=SMALL)
    other = AutoModel.from_pretrained(again).state_dict()
    assert all(torch.equal(weights[name], other[name]) for name in weights)
    assert metrics["vocab_size"] == 200
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("so, 7").input_ids) == "[CLS] so, 7 [SEP]"
    reloaded = load_encoder(
        str(folder), task=None, dtype="float32", attn_implementation="sdpa", key="student"
    )
    assert reloaded.config.max_position_embeddings == POSITIONS


def test_bad_input(take, package) -> None:
    def refusal(**changes: Any) -> str:
        with pytest.raises(UserError) as refused:
            take(**changes)
        return str(refused.value)

    assert refusal(folder="lib/modl") == (
        "stages.pretrained.folder=lib/modl: there is no config.json in it; the models of "
        f"{package} are lib/model; did you mean 'lib/model'?"
    )
    assert refusal(architecture=ARCHITECTURE | {"num_hidden_layers": 12}) == (
        "stages.pretrained.architecture.num_hidden_layers=12: the model has 3; set "
        "stages.pretrained.architecture.num_hidden_layers=3"
    )
    assert refusal(synthetic=True) == (
        "stages.pretrained.architecture.vocab_size=23: expected at least 109, the special tokens "
        "and those of characters"
    )
    CONFIGS["bert"].save_pretrained(package / "lib/model")
    (package / "lib/model/model.safetensors").unlink()
    assert refusal().startswith(f"stages.pretrained.path={package}/lib/model: ")
    shutil.rmtree(package / "lib/model")
    assert refusal() == (
        "stages.pretrained.folder=lib/model: there is no config.json in it; the models of "
        f"{package} are none"
    )
