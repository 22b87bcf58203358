"""Small models of the families that can share attention, and sharing written out in plain torch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

V = 53
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.4,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": 1,
}
# Blocks 3 to 5 attend within a window shorter than the sequences.
WINDOW: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=4, head_dim=8),
    "qwen2": Qwen2Config(**SHAPE, **WINDOW),
    "qwen3": Qwen3Config(**SHAPE, **WINDOW, head_dim=8),
}
FOLLOWERS = [2, 5, 4]
LEADERS = [0, 1, 1, 3, 3, 3]


def full_model(family: str, **changes: Any) -> Any:
    """Return a random model in float64, in eval mode; its norms compute in float32."""
    torch.manual_seed(0)
    config = type(CONFIGS[family]).from_dict(CONFIGS[family].to_dict() | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()


def some_ids(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randint(2, V, sizes, generator=torch.Generator().manual_seed(seed))


def logits_by_hand(full: Any, leaders: Sequence[int], ids: Tensor) -> Tensor:
    """Return a full model's logits with each layer's matrix taken from its leader, in torch."""
    body, config, count = full.model, full.config, ids.shape[1]
    x = body.embed_tokens(ids)
    cos, sin = body.rotary_emb(x, torch.arange(count)[None])
    distance = torch.arange(count)[:, None] - torch.arange(count)
    matrices: dict[int, Tensor] = {}
    for index, block in enumerate(body.layers):
        attention, h = block.self_attn, block.input_layernorm(x)

        def heads(t: Tensor, width: int = attention.head_dim) -> Tensor:
            return t.unflatten(-1, (-1, width))

        if leaders[index] == index:
            q, k = heads(attention.q_proj(h)), heads(attention.k_proj(h))
            if hasattr(attention, "q_norm"):
                q, k = attention.q_norm(q), attention.k_norm(k)
            q, k = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
            types = getattr(config, "layer_types", None)
            slides = types[index] == "sliding_attention" if types else config.model_type != "llama"
            seen = (distance >= 0) & (distance < (config.sliding_window if slides else count))
            S = q @ k.repeat_interleave(2, dim=1).mT * attention.head_dim**-0.5
            matrices[index] = S.masked_fill(~seen, -torch.inf).softmax(-1)
        v = heads(attention.v_proj(h)).transpose(1, 2).repeat_interleave(2, dim=1)
        out = matrices[leaders[index]] @ v
        x = x + attention.o_proj(out.transpose(1, 2).flatten(2))
        x = x + block.mlp(block.post_attention_layernorm(x))
    return full.lm_head(body.norm(x))
