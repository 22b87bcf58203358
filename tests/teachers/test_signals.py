"""Which model a signal is of: a folder by its content, a model of the hub by its commit."""

from pathlib import Path

import huggingface_hub
import pytest
from exercise_cases import save_chat_model, save_hub_model
from transformers.utils.hub import cached_file

from stillhouse.teachers.signals import hub_revision, model_identity, model_provenance

OLD, NEW = "12" * 20, "ef" * 20


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub, nothing beyond it in reach."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_model_of_the_hub_is_its_id_and_the_commit_that_is_loaded(cache, tiny_llama) -> None:
    for commit in (OLD, NEW):
        save_hub_model(cache, "org/tiny", commit, tiny_llama)
        assert f"/{commit}/" in str(cached_file("org/tiny", "config.json"))
        assert hub_revision("org/tiny") == commit
        assert model_identity("org/tiny") == f"hub:org/tiny@{commit}"
    assert model_provenance("org/tiny") == {"model": "org/tiny", "model_revision": NEW}


@pytest.mark.parametrize("path", ["org/unknown", "/no/such/folder"])
def test_a_model_that_is_not_here_has_no_commit(cache, path) -> None:
    assert model_identity(path) == f"hub:{path}"
    assert model_provenance(path) == {"model": path, "model_revision": None}


def test_a_folder_is_its_weights_and_shape(tmp_path, tiny_llama) -> None:
    one = save_chat_model(tmp_path / "one", tiny_llama)
    again = save_chat_model(tmp_path / "again", tiny_llama)
    other = save_chat_model(tmp_path / "other", tiny_llama, seed=1)
    assert model_identity(str(one)) == model_identity(str(again)) != model_identity(str(other))
    (again / "notes.txt").write_text("of no matter")
    assert model_identity(str(one)) == model_identity(str(again))
    assert model_provenance(str(one)) == {
        "model": str(one),
        "model_sha256": model_identity(str(one)),
    }
