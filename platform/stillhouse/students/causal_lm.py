"""Causal language models: from scratch by shape, or any of `transformers` by path."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer, one_line
from stillhouse.errors import UserError
from stillhouse.ranges import Count, Positive, Share
from stillhouse.records.language import LanguageOutput, SequenceBatch, VocabularyHead
from stillhouse.sharding import through
from stillhouse.students import modeling_shared_attention

# Models with code of their own: the folder brings it along, this package has it anyway.
for own in modeling_shared_attention.MODELS:
    AutoConfig.register(own.config_class.model_type, own.config_class)
    AutoModelForCausalLM.register(own.config_class, own)


def llama(
    data: LanguageData,
    *,
    hidden_size: Count,
    intermediate_size: Count,
    num_hidden_layers: Count,
    num_attention_heads: Count,
    num_key_value_heads: Count,
    max_position_embeddings: Count = 2048,
    rope_theta: Positive = 10000.0,
    tie_word_embeddings: bool = True,
    attention_dropout: Share = 0.0,
    attn_implementation: str = "sdpa",
) -> LlamaForCausalLM:
    """Make a Llama-shaped model with random weights for the data's vocabulary.

    The arguments are those of `transformers.LlamaConfig`; the global torch seed decides the
    weights.

    Raises:
        UserError: when the heads do not divide the width, or each other.
    """
    if hidden_size % num_attention_heads or num_attention_heads % num_key_value_heads:
        raise UserError(
            f"hidden_size={hidden_size} must be a multiple of num_attention_heads="
            f"{num_attention_heads}, and that of num_key_value_heads={num_key_value_heads}"
        )
    tokenizer: Any = data.tokenizer
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        max_position_embeddings=max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        tie_word_embeddings=tie_word_embeddings,
        attention_dropout=attention_dropout,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)


def pretrained(
    data: LanguageData,
    *,
    path: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load any causal language model as a student.

    Args:
        data: its tokenizer must be the model's own.
        path: model folder, or an id of the hub.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers`.

    Raises:
        UserError: when no model lies there, or its tokenizer is another one than the data's.
    """
    model = load_causal_lm(
        path, dtype=dtype, attn_implementation=attn_implementation, key="student"
    )
    check_same_tokenizer(path, data.tokenizer, key="student")
    return model.train()


def load_causal_lm(path: str, *, dtype: str, attn_implementation: str, key: str) -> PreTrainedModel:
    """Load a causal language model whose head this package can read.

    Raises:
        UserError: for a folder without a model, a dtype that torch does not have, or a head that
            is more than a linear layer with scale and soft-cap.
    """
    check_model_folder(path, key=key)
    check_dtype(dtype, key=key)
    with loading(f"{key}.path={path}"):
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, attn_implementation=attn_implementation
        )
    _check_head(model, f"{key}.path={path}")
    return model


@contextmanager
def loading(where: str) -> Iterator[None]:
    """Tell in one line what cannot be loaded.

    Args:
        where: the model stands in the config, key and value.
    """
    try:
        yield
    except Exception as error:  # the libraries below raise whatever a broken file makes them
        raise UserError(f"{where}: cannot be loaded: {one_line(error)}") from error


def check_dtype(dtype: str, *, key: str) -> None:
    """Refuse a dtype that torch does not have.

    Raises:
        UserError: naming the usual ones.
    """
    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"{key}.dtype={dtype}: expected auto, float32, bfloat16 or float16")


def check_model_folder(path: str, *, key: str) -> None:
    """Refuse a local folder that holds no model, before a library looks for it on the hub.

    Raises:
        UserError: naming what is missing.
    """
    folder = Path(path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{key}.path={path}: the folder has no config.json; expected a model saved with "
            "save_pretrained, for example the student/ of a run directory"
        )
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    if looks_local and not folder.exists():
        raise UserError(f"{key}.path={path}: there is no such folder")


def vocabulary_head(model: PreTrainedModel) -> VocabularyHead:
    """Return a causal model's head as a record; its tensors are the model's own."""
    layer: Any = model.get_output_embeddings()
    config: Any = model.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    return VocabularyHead(
        weight=layer.weight,
        bias=getattr(layer, "bias", None),
        logit_scale=scale,
        logit_softcap=getattr(config, "final_logit_softcapping", None),
    )


def read_output(
    model: nn.Module, batch: SequenceBatch, *, layers: Sequence[int] = ()
) -> LanguageOutput:
    """Run a causal model's body on a batch; the head is handed on, not applied.

    Args:
        model: the model, perhaps with adapters around it.
        batch: its sequences.
        layers: whose hidden states are kept, as `LanguageOutput.layers` numbers them.
    """
    padding = batch.attention_mask
    output = through(
        model,
        _body,
        input_ids=batch.input_ids,
        attention_mask=None if padding is None else padding.long(),
        use_cache=False,
        output_hidden_states=bool(layers),
    )
    return LanguageOutput(
        hidden_states=output.last_hidden_state,
        head=vocabulary_head(without_adapters(model)),
        layers={layer: output.hidden_states[layer] for layer in layers},
    )


def _body(model: nn.Module, **inputs: Any) -> Any:
    body: Any = without_adapters(model).base_model
    return body(**inputs)


def without_adapters(model: nn.Module) -> PreTrainedModel:
    """Return the model that `peft` has wrapped; the adapters stay inside its layers."""
    perhaps_wrapped: Any = model
    return perhaps_wrapped.get_base_model() if hasattr(model, "peft_config") else perhaps_wrapped


def merged(model: nn.Module) -> PreTrainedModel:
    """Return a plain model: adapters, where there are any, are added to the weights, in place."""
    perhaps_wrapped: Any = model
    return perhaps_wrapped.merge_and_unload() if hasattr(model, "peft_config") else perhaps_wrapped


@torch.no_grad()
def _check_head(model: PreTrainedModel, where: str) -> None:
    """Compare the model's own logits with those of body and head, once, on four tokens."""
    ids = torch.arange(4, device=model.device).unsqueeze(0)
    batch = SequenceBatch(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    was_training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False).logits.float()
    ours = read_output(model, batch).logits.float()
    model.train(was_training)
    if own.shape != ours.shape or (own - ours).norm() > 1e-2 * own.norm():
        raise UserError(
            f"{where}: the head of {type(model).__name__} is more than a linear layer with scale "
            "and soft-cap, which the families of this package do not read yet"
        )
