"""Llama, Mistral, Qwen2 and Qwen3 whose layers share attention matrices (EchoAtt, 2409.14595).

A leader computes A = softmax(scale Q K^T + mask); its followers, layers behind it, take A and have
values, an output projection and an MLP of their own:  O_l = A V_l. A follower has no query and key
projection, no rotary step and no keys in the cache. `config.attention_leaders[l]` is the layer
whose matrix layer l takes: l itself, where it computes its own. A layer that leads nobody is the
library's.

This file stands alone: it is saved beside the weights, and needs torch and transformers only.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Where `stillhouse_kernels` is installed, its kernels are used; elsewhere A is a tensor.

Shape legend: B batch, h heads, N queries, M keys, d head width, D width of the hidden states.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    MistralModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    apply_rotary_pos_emb,
)
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

try:
    from stillhouse_kernels import follower_attention, leader_attention
except ImportError:

    def leader_attention(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float
    ) -> tuple[Tensor, Any]:
        """Return A V [B, h, N, d] and A [B, h, N, M]; a query without keys gets 0."""
        rows, keys = q.shape[2], k.shape[2]
        if causal:
            mask = torch.ones(rows, keys, dtype=torch.bool, device=q.device).tril_(keys - rows)
        scores = scale * q @ k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).mT
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        A = scores.float().softmax(-1).nan_to_num(0.0).to(v.dtype)
        return follower_attention(A, v), A

    def follower_attention(state: Any, v: Tensor) -> Tensor:
        """Return A V [B, h, N, d]."""
        return state @ v.repeat_interleave(state.shape[1] // v.shape[1], dim=1)


def check_leaders(leaders: list[int], layer_types: list[str] | None) -> None:
    """Check that every follower has a leader before it, of its own kind.

    Args:
        leaders: for every layer the one whose matrix it takes.
        layer_types: `full_attention` or `sliding_attention` for every layer; None: all alike.

    Raises:
        ValueError: naming the layer.
    """
    for layer, leader in enumerate(leaders):
        if not 0 <= leader < len(leaders):
            raise ValueError(
                f"layer {layer} follows layer {leader}, which is not there; the model has the "
                f"layers 0 to {len(leaders) - 1}"
            )
        if leader > layer:
            raise ValueError(
                f"layer {layer} follows layer {leader}, which comes after it; a leader comes first"
            )
        if leaders[leader] != leader:
            raise ValueError(
                f"layer {layer} follows layer {leader}, which itself follows layer "
                f"{leaders[leader]}; expected {leaders[leader]}"
            )
        if layer_types is not None and layer_types[leader] != layer_types[layer]:
            raise ValueError(
                f"layer {layer} ({layer_types[layer]}) follows layer {leader} "
                f"({layer_types[leader]}); layers of a group must see the same keys"
            )


class SharedAttentionConfig:
    """What the configs of this file have in common.

    Attributes:
        attention_leaders: for every layer the one whose matrix it takes; None shares none.

    Raises:
        ValueError: as `check_leaders`, for another number of layers, and for attention dropout,
            which the kernels do not have.
    """

    def __post_init__(self, **kwargs: Any) -> None:
        family, config = cast(Any, super()), cast(Any, self)
        family.__post_init__(**kwargs)
        if config.attention_leaders is None:
            config.attention_leaders = list(range(config.num_hidden_layers))
        named = len(config.attention_leaders)
        if named != config.num_hidden_layers:
            raise ValueError(
                f"attention_leaders={config.attention_leaders} names {named} layers, "
                f"num_hidden_layers={config.num_hidden_layers}"
            )
        if config.attention_dropout:
            raise ValueError(
                f"attention_dropout={config.attention_dropout}: layers that share attention have "
                "none; expected 0"
            )
        check_leaders(config.attention_leaders, getattr(config, "layer_types", None))


class Handover:
    """Where leaders leave what followers take, during one forward pass.

    Not a mapping: wrappers of modules (FSDP2, accelerate) rebuild those on their way into a layer,
    and a leader would write into a copy.
    """

    def __init__(self) -> None:
        self._states: dict[int, tuple[Any, int]] = {}

    def put(self, leader: int, state: Any, keys: int) -> None:
        """Leave a leader's state and the number of its keys."""
        self._states[leader] = (state, keys)

    def take(self, leader: int, last: bool) -> tuple[Any, int]:
        """Return what a leader left; the last follower lets go of it, for a state may hold A."""
        return self._states.pop(leader) if last else self._states[leader]


class Leader:
    """Attention that hands its matrix on; in front of a family's own attention class."""

    def forward(
        self: Any,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Return [B, N, D]; leave the matrix in `kwargs["handover"]`."""
        heads = (-1, self.head_dim)
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (project(hidden_states).unflatten(-1, heads) for project in projections)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        mask = attention_mask
        if mask is None and q.shape[2] > 1:
            # The library's sign for plain causal attention from the first key on. A static cache
            # is longer than what it holds.
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        elif mask is not None and mask.dtype != torch.bool:
            mask = mask == 0  # the additive mask of eager attention
        out, state = leader_attention(q, k, v, mask=mask, causal=mask is None, scale=self.scaling)
        kwargs["handover"].put(self.layer_idx, state, k.shape[2])
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class Follower(nn.Module):
    """Attention with the matrix of the layer `leader`.

    Args:
        own: the layer's attention as the family makes it; its value and output projections stay.
        leader: the layer whose matrix is taken.
        last: whether no later layer takes it.
    """

    def __init__(self, own: Any, leader: int, last: bool) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = own.layer_idx, own.head_dim
        self.leader, self.last = leader, last
        self.v_proj, self.o_proj = own.v_proj, own.o_proj

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        *,
        handover: Handover,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Return [B, N, D], with the matrix that the leader left."""
        v = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        if past_key_values is not None:
            # The cache counts its tokens by its keys: the values stand there, and nothing behind.
            v, _ = past_key_values.update(v, v[..., :0], self.layer_idx)
        state, keys = handover.take(self.leader, self.last)
        out = follower_attention(state, v[:, :, :keys])
        return self.o_proj(out.transpose(1, 2).flatten(2)), None


class SharedAttentionModel:
    """A body whose layers share attention; in front of a family's own body."""

    # A checkpoint around one layer would run the leader again for every follower.
    supports_gradient_checkpointing = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    leader_class: Any

    def __init__(self, config: Any) -> None:
        family, body = cast(Any, super()), cast(Any, self)
        family.__init__(config)
        last_of = {leader: layer for layer, leader in enumerate(config.attention_leaders)}
        for layer, leader in enumerate(config.attention_leaders):
            block = body.layers[layer]
            if leader != layer:
                block.self_attn = Follower(block.self_attn, leader, last_of[leader] == layer)
            elif last_of[layer] != layer:
                block.self_attn = self.leader_class(config, layer)
        body.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the body, its layers handing matrices over."""
        return cast(Any, super()).forward(*args, handover=Handover(), **kwargs)


class SharedAttentionForCausalLM:
    """A causal language model with such a body; in front of a family's own."""

    supports_gradient_checkpointing = False
    _supports_flash_attn = False
    _supports_flex_attn = False
    config_class: Any
    body_class: Any
    family: Any

    def __init__(self, config: Any) -> None:
        model: Any = self
        # Past the family's own constructor, which would make a second body.
        super(model.family, model).__init__(config)
        model.model = self.body_class(config)
        model.vocab_size = config.vocab_size
        model.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        model.post_init()


class SharedAttentionLlamaConfig(SharedAttentionConfig, LlamaConfig):
    """The config of a Llama that shares attention."""

    model_type = "shared_attention_llama"
    attention_leaders: list[int] | None = None


class SharedAttentionMistralConfig(SharedAttentionConfig, MistralConfig):
    """The config of a Mistral that shares attention."""

    model_type = "shared_attention_mistral"
    attention_leaders: list[int] | None = None


class SharedAttentionQwen2Config(SharedAttentionConfig, Qwen2Config):
    """The config of a Qwen2 that shares attention."""

    model_type = "shared_attention_qwen2"
    attention_leaders: list[int] | None = None


class SharedAttentionQwen3Config(SharedAttentionConfig, Qwen3Config):
    """The config of a Qwen3 that shares attention."""

    model_type = "shared_attention_qwen3"
    attention_leaders: list[int] | None = None


class LlamaLeader(Leader, LlamaAttention):
    """Llama's attention, its matrix handed on."""


class MistralLeader(Leader, MistralAttention):
    """Mistral's attention, its matrix handed on."""


class Qwen2Leader(Leader, Qwen2Attention):
    """Qwen2's attention, its matrix handed on."""


class Qwen3Leader(Leader, Qwen3Attention):
    """Qwen3's attention, its matrix handed on."""


class SharedAttentionLlamaModel(SharedAttentionModel, LlamaModel):
    """Llama's body, its layers sharing attention."""

    config_class = SharedAttentionLlamaConfig
    leader_class = LlamaLeader
    _can_record_outputs: ClassVar = {"hidden_states": LlamaDecoderLayer}


class SharedAttentionMistralModel(SharedAttentionModel, MistralModel):
    """Mistral's body, its layers sharing attention."""

    config_class = SharedAttentionMistralConfig
    leader_class = MistralLeader
    _can_record_outputs: ClassVar = {"hidden_states": MistralDecoderLayer}


class SharedAttentionQwen2Model(SharedAttentionModel, Qwen2Model):
    """Qwen2's body, its layers sharing attention."""

    config_class = SharedAttentionQwen2Config
    leader_class = Qwen2Leader
    _can_record_outputs: ClassVar = {"hidden_states": Qwen2DecoderLayer}


class SharedAttentionQwen3Model(SharedAttentionModel, Qwen3Model):
    """Qwen3's body, its layers sharing attention."""

    config_class = SharedAttentionQwen3Config
    leader_class = Qwen3Leader
    _can_record_outputs: ClassVar = {"hidden_states": Qwen3DecoderLayer}


class SharedAttentionLlamaForCausalLM(SharedAttentionForCausalLM, LlamaForCausalLM):
    """A Llama whose layers share attention."""

    config_class = SharedAttentionLlamaConfig
    body_class = SharedAttentionLlamaModel
    family = LlamaForCausalLM


class SharedAttentionMistralForCausalLM(SharedAttentionForCausalLM, MistralForCausalLM):
    """A Mistral whose layers share attention."""

    config_class = SharedAttentionMistralConfig
    body_class = SharedAttentionMistralModel
    family = MistralForCausalLM


class SharedAttentionQwen2ForCausalLM(SharedAttentionForCausalLM, Qwen2ForCausalLM):
    """A Qwen2 whose layers share attention."""

    config_class = SharedAttentionQwen2Config
    body_class = SharedAttentionQwen2Model
    family = Qwen2ForCausalLM


class SharedAttentionQwen3ForCausalLM(SharedAttentionForCausalLM, Qwen3ForCausalLM):
    """A Qwen3 whose layers share attention."""

    config_class = SharedAttentionQwen3Config
    body_class = SharedAttentionQwen3Model
    family = Qwen3ForCausalLM


MODELS: tuple[Any, ...] = (
    SharedAttentionLlamaForCausalLM,
    SharedAttentionMistralForCausalLM,
    SharedAttentionQwen2ForCausalLM,
    SharedAttentionQwen3ForCausalLM,
)
# What `save_pretrained` writes into the config, and that it copies this file.
for model_class in MODELS:
    model_class.config_class.register_for_auto_class()
    model_class.register_for_auto_class("AutoModelForCausalLM")
