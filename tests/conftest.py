"""What every test needs: nothing fetched, one thread, and a tiny language model."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
torch.set_num_threads(1)


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
