"""Small random decoders of every family whose blocks are known, six blocks each."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from stillhouse.students.blocks import blocks_of

V = 23
TOKENS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.4,
    **TOKENS,
}
# A window shorter than the sequences: a block that took another's kind would change the logits.
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 3, "max_window_layers": 3}
KINDS = ["sliding_attention", "full_attention", "sliding_attention"] * 2
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "llama, tied": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=3, head_dim=8),
    "qwen2": Qwen2Config(**SHAPE, **WINDOW),
    "qwen3": Qwen3Config(**SHAPE, **WINDOW, head_dim=8),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": Gemma2Config(**SHAPE, head_dim=8, sliding_window=3),
    "gemma3_text": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=3, layer_types=KINDS),
    "gpt2": GPT2Config(
        vocab_size=V,
        n_embd=16,
        n_layer=6,
        n_head=2,
        n_positions=32,
        initializer_range=0.4,
        **TOKENS,
    ),
    "gpt_neox": GPTNeoXConfig(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=6,
        num_attention_heads=2,
        initializer_range=0.4,
        **TOKENS,
    ),
}
# Of these families the last projections of attention and of the feed-forward network.
HANDS_ON = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h")


def make(family: str, attention: str = "eager") -> Any:
    """Return a model in float64, its weights from one seed; biases are random too."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=attention)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(std=0.2)
    return model.double().eval()


@torch.no_grad()
def silence(model: Any, blocks: range) -> None:
    """Let these blocks hand on what they are given: they still compute, and add nothing."""
    for block in (blocks_of(model)[index] for index in blocks):
        layers = {n: m for n, m in block.named_modules() if n.split(".")[-1] in HANDS_ON}
        assert len(layers) == 2
        for layer in layers.values():
            for weight in layer.parameters():
                weight.zero_()


@torch.no_grad()
def logits_passing_over(model: Any, blocks: set[int], ids: Tensor) -> Tensor:
    """Return the logits of a model some of whose blocks hand on what they are given."""

    def pass_over(block: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return given[0]

    handles = [blocks_of(model)[index].register_forward_hook(pass_over) for index in blocks]
    logits = model(ids, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits
