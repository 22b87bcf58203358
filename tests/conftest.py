"""What every test needs: nothing fetched, one thread, and a tiny language model."""

import gc
import inspect
import io
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# For the processes that tests start: two workers of `pytest -n 2` share two cores.
os.environ["OMP_NUM_THREADS"] = "1"
# Read when a kernel is defined: without a GPU, Triton's interpreter runs it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests first, so that the workers of `pytest -n 2` end together."""

    def minutes(item: pytest.Item) -> float:
        mark = item.get_closest_marker("slow")
        return mark.kwargs.get("minutes", 0) if mark else 0

    items.sort(key=minutes, reverse=True)


def pytest_collection_finish() -> None:
    """Garbage collections, which evaluators ask for, pass over what the collection has imported."""
    gc.freeze()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty present folder, with a cache of its own below it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """A function that makes a random Llama in float64 from a seed; keywords change its config."""
    # Imported late: transformers reads HF_HUB_OFFLINE once, when it is first imported.
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(seed: int = 0, **changes: Any) -> Any:
        shape = {
            "vocab_size": 23,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "initializer_range": 0.2,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(shape | changes))).double().eval()

    return make


@dataclass(frozen=True)
class LanguageWorld:
    """A random teacher in a folder with its tokenizer, and data that speak of the same tokens."""

    model: Path

    def data(self, **changes: Any) -> Any:
        """Return a `LanguageData` over the first chapters of the embedded corpus."""
        from stillhouse.data.language import LanguageData

        settings = {
            "corpus": {"_target_": "stillhouse.data.corpora.king_james.king_james"},
            "tokenizer_path": str(self.model),
            "sequence_length": 24,
            "batch_size": 4,
            "evaluation_batch_size": 8,
            "packing": False,
            "max_train_documents": 3,
        }
        return LanguageData(0, **(settings | changes))

    def node(self, **changes: Any) -> dict[str, Any]:
        """Return the same data as a stage's node."""
        keywords = inspect.signature(type(self.data())).parameters
        data = self.data(**changes)
        known = {n: getattr(data, n) for n in keywords if n not in ("seed", "corpus")}
        target = {"_target_": "stillhouse.data.language.LanguageData", "_partial_": True}
        return {**target, **known, "corpus": data.corpus_node}


@pytest.fixture(scope="session")
def language_world(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> LanguageWorld:
    """A tiny teacher of 300 tokens; weights in float32."""
    from transformers import PreTrainedTokenizerFast

    from stillhouse.data.corpora.king_james import king_james
    from stillhouse.data.tokenizers import byte_level_bpe

    folder = tmp_path_factory.mktemp("teacher")
    texts = [str(d) for d in king_james().documents("train")[:20]]
    special = ["<|end|>", "<|pad|>"]
    PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(texts, vocab_size=300, special_tokens=special),
        bos_token="<|end|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
    ).save_pretrained(folder)
    tiny_llama(vocab_size=300, initializer_range=0.5).float().save_pretrained(folder)
    return LanguageWorld(folder)


@pytest.fixture
def stage_context(tmp_path: Path) -> Callable[..., Any]:
    """A function that makes the context of a stage; the same name gives the same scratch folder."""
    from rich.console import Console

    from stillhouse.stages.stage import StageContext
    from stillhouse.tracking.tracker import FileTracker

    def make(name: str, **changes: Any) -> Any:
        scratch = tmp_path / f"work of {name}"
        output = scratch / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        console = Console(file=io.StringIO())
        return StageContext(name, output, scratch, FileTracker(None), console, **changes)

    return make
