"""Encoders of BERT's kind: made by shape, or any of `transformers` by path; and their taps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
)

from stillhouse.data.encoders import EncoderData
from stillhouse.data.labelled.task import Task
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.errors import UserError
from stillhouse.ranges import Count, Positive, Share
from stillhouse.records.encoders import AttentionTap, EncoderBatch, EncoderOutput
from stillhouse.sharding import is_sharded, through
from stillhouse.students.causal_lm import check_dtype, check_model_folder, loading
from stillhouse.students.encoder_layouts import (
    LAYOUTS,
    blocks_of,
    body_of,
    check_positions,
    layout_of,
    max_tokens,
    projections_of,
)

OWN_TOKENIZER = (
    "teacher, student and data read the same token ids: set data.tokenizer_path to the model that "
    "the others follow, and take models of one family, or student=encoder, which is made for any"
)
PROBLEMS = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi_label": "multi_label_classification",
}


def encoder(
    data: EncoderData,
    *,
    hidden_size: Count,
    intermediate_size: Count,
    num_hidden_layers: Count,
    num_attention_heads: Count,
    max_position_embeddings: Count = 512,
    hidden_dropout_prob: Share = 0.1,
    attention_probs_dropout_prob: Share = 0.1,
    initializer_range: Positive = 0.02,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Make a BERT with random weights for the data's vocabulary, with a head for its task.

    The arguments are those of `transformers.BertConfig`; the global torch seed decides the
    weights.

    Raises:
        UserError: when the heads do not divide the width, or there are too few positions.
    """
    if hidden_size % num_attention_heads:
        raise UserError(
            f"student.hidden_size={hidden_size}: expected a multiple of "
            f"student.num_attention_heads={num_attention_heads}"
        )
    tokenizer: Any = data.tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        max_position_embeddings=max_position_embeddings,
        hidden_dropout_prob=hidden_dropout_prob,
        attention_probs_dropout_prob=attention_probs_dropout_prob,
        initializer_range=initializer_range,
        pad_token_id=tokenizer.pad_token_id,
    )
    auto = _with_head(config, data.task)
    model = auto.from_config(config, attn_implementation=attn_implementation)
    check_positions(model, data, where="student")
    return model.train()


def pretrained_encoder(
    data: EncoderData,
    *,
    path: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Load any encoder that `encoder_layouts` knows, such as the student of an earlier stage.

    Args:
        data: its tokenizer must be the model's own; where it has a task, the student has a head
            for it, the stored one or, where there is none, a new one.
        path: model folder, or an id of the hub.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers`.

    Raises:
        UserError: as `load_encoder` and `check_fits`.
    """
    model = load_encoder(
        path, task=data.task, dtype=dtype, attn_implementation=attn_implementation, key="student"
    )
    check_fits(model, data, path=path, key="student")
    return model.train()


def load_encoder(
    path: str, *, task: Task | None, dtype: str, attn_implementation: str, key: str
) -> PreTrainedModel:
    """Load an encoder, with a head where there is a task.

    A head that the folder lacks is made with random weights, as the global torch seed decides.

    Args:
        path: model folder, or an id of the hub.
        task: what the head says; None loads the body alone.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers`.
        key: where the path stands in the config, for messages.

    Raises:
        UserError: for a folder without a model or with one of another kind, weights that are
            missing, a dtype that torch does not have, an attention that the model does not have,
            and a stored head of another task.
    """
    check_dtype(dtype, key=key)
    config = stored_config(path, key=key)
    where = f"{key}.path={path}"
    if task is not None and _has_head(config):
        _check_head(config, task, where)
    auto = _with_head(config, task)
    # DeBERTa; transformers' own message is longer than a line.
    if attn_implementation == "sdpa" and not auto._model_mapping[type(config)]._supports_sdpa:
        raise UserError(
            f"{where}: a model of the type {config.model_type} has no attention sdpa; set "
            "attn_implementation=eager, beside the path"
        )
    with loading(where):
        model, report = auto.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    _check_body_is_there(model, report["missing_keys"], where)
    return model


def check_fits(model: nn.Module, data: EncoderData, *, path: str, key: str) -> None:
    """Refuse a model that cannot read what the data hand out.

    Args:
        model: the model.
        data: the data.
        path: where the model was loaded from.
        key: where the path stands in the config, for messages.

    Raises:
        UserError: when its tokenizer is another one than the data's, or it has fewer positions
            than they have tokens.
    """
    check_same_tokenizer(path, data.tokenizer, key=key, way_out=OWN_TOKENIZER)
    check_positions(model, data, where=f"{key}.path={path}")


def has_head(path: str, *, key: str) -> bool:
    """Return whether a folder or a hub id holds an encoder with a head that says things of texts.

    Raises:
        UserError: when no encoder that `encoder_layouts` knows lies there.
    """
    return _has_head(stored_config(path, key=key))


def read_encoder(
    model: nn.Module,
    batch: EncoderBatch,
    *,
    hidden_layers: Sequence[int] = (),
    attention_layers: Sequence[int] = (),
) -> EncoderOutput:
    """Run an encoder once, and keep what passes through the layers that were asked for.

    Args:
        model: an encoder that `encoder_layouts` knows, with a head or without.
        batch: its texts.
        hidden_layers: whose hidden states are kept: 0 the embeddings as block 1 gets them, i what
            block i hands on.
        attention_layers: of which blocks, from 1, queries, keys and values are kept. Whatever
            computes the attention, it is softmax(Q K^T / sqrt(E)) over the keys that are no
            padding, before dropout.

    Raises:
        UserError: for texts that the model has no positions for, and the attention of one whose
            queries and keys do not tell it.
    """
    config: Any = body_of(model).config
    _check_length(batch, model)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask.long()}
    # Where a model knows one type only, the token between two texts tells them apart.
    if batch.token_type_ids is not None and getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = batch.token_type_ids
    output, hidden, projected = through(model, _tap, inputs, hidden_layers, attention_layers)
    heads = config.num_attention_heads
    attention = {
        layer: AttentionTap(*(_by_head(projected[layer, part], heads) for part in range(3)))
        for layer in attention_layers
    }
    return EncoderOutput(
        hidden_states={layer: hidden[layer] for layer in hidden_layers},
        attention=attention,
        logits=getattr(output, "logits", None),
    )


def _tap(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    hidden_layers: Sequence[int],
    attention_layers: Sequence[int],
) -> tuple[Any, dict[int, Tensor], dict[tuple[int, int], Tensor]]:
    """Call a model; return what it says, hidden states by layer, projections by layer and part."""
    with _tapped(model, hidden_layers, attention_layers) as (hidden, projected):
        # A model whose weights are shared is being called already.
        call = model.forward if is_sharded(model) else model
        output = call(**inputs)
    return output, hidden, projected


@contextmanager
def _tapped(
    model: nn.Module, hidden_layers: Sequence[int], attention_layers: Sequence[int]
) -> Iterator[tuple[dict[int, Tensor], dict[tuple[int, int], Tensor]]]:
    """Keep hidden states by layer, and projections by layer and part, while the model runs."""
    layout, blocks = layout_of(model), blocks_of(model)
    assert all(0 <= layer <= len(blocks) for layer in hidden_layers), hidden_layers
    assert all(1 <= layer <= len(blocks) for layer in attention_layers), attention_layers
    hidden: dict[int, Tensor] = {}
    projected: dict[tuple[int, int], Tensor] = {}
    with ExitStack() as hooks:

        def keep_given(block: nn.Module, layer: int) -> None:
            handle = block.register_forward_pre_hook(
                lambda module, inputs: hidden.update({layer: inputs[0]})
            )
            hooks.callback(handle.remove)

        def keep_output(module: nn.Module, kept: dict[Any, Tensor], name: object) -> None:
            handle = module.register_forward_hook(
                lambda module, inputs, output: kept.update({name: _tensor_of(output)})
            )
            hooks.callback(handle.remove)

        for layer in hidden_layers:
            if layer < len(blocks):
                # What the next block gets: DeBERTa changes it on the way.
                keep_given(blocks[layer], layer)
            else:
                stack = body_of(model).get_submodule(layout.blocks.rpartition(".")[0])
                keep_output(stack, hidden, layer)
        for layer in attention_layers:
            for part, name in enumerate(projections_of(model, attention_layers)):
                projection = blocks[layer - 1].get_submodule(name)
                keep_output(projection, projected, (layer, part))
        yield hidden, projected


def _tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _by_head(projected: Float[Tensor, "B N HE"], heads: int) -> Float[Tensor, "B H N E"]:
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


def _check_length(batch: EncoderBatch, model: nn.Module) -> None:
    tokens, limit = batch.input_ids.shape[1], max_tokens(model)
    if limit is not None and tokens > limit:
        raise UserError(
            f"data.sequence_length: there is a text of {tokens} tokens, and the "
            f"{body_of(model).config.model_type} model has {limit} positions; expected "
            f"data.sequence_length={limit} or less"
        )


def stored_config(path: str, *, key: str) -> Any:
    """Read the config of an encoder.

    Raises:
        UserError: when there is none, or it is one of another kind.
    """
    check_model_folder(path, key=key)
    with loading(f"{key}.path={path}"):
        config: Any = AutoConfig.from_pretrained(path)
    if config.model_type not in LAYOUTS:
        raise UserError(
            f"{key}.path={path}: a model of the type {config.model_type}; expected an encoder of "
            f"the type {', '.join(LAYOUTS)}"
        )
    return config


def _has_head(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _with_head(config: Any, task: Task | None) -> Any:
    """Write a task into a config, and return the class that makes its model."""
    if task is None:
        return AutoModel
    config.problem_type = PROBLEMS[task.kind]
    config.id2label = dict(enumerate(task.names))
    config.label2id = {name: index for index, name in enumerate(task.names)}
    return AutoModelForSequenceClassification


def _check_head(config: Any, task: Task, where: str) -> None:
    """Refuse a stored head that says something else than the task asks, or in another order."""
    stored = [config.id2label[index] for index in range(config.num_labels)]
    kinds = {problem: kind for kind, problem in PROBLEMS.items()}
    # Older folders do not say their kind.
    kind = kinds.get(config.problem_type)
    other_order = set(stored) == set(task.names) and stored != list(task.names)
    if len(stored) != task.num_labels or kind not in (None, task.kind) or other_order:
        said = ("" if kind is None else f"the {kind} of ") + ", ".join(stored)
        raise UserError(
            f"{where}: its head is made for {said}, the data for the {task.kind} of "
            f"{', '.join(task.names)}; take a model without a head, or one that was fine-tuned on "
            "this task"
        )


def _check_body_is_there(model: PreTrainedModel, missing: Sequence[str], where: str) -> None:
    """Refuse a folder that lacks more than what is made for a task: the head and the pooler."""
    prefix = f"{model.base_model_prefix}."
    bare = model.base_model is model
    body = [name for name in missing if bare or name.startswith(prefix)]
    lost = sorted(name for name in body if ".pooler." not in f".{name}")
    if lost:
        raise UserError(
            f"{where}: {len(lost)} weights of the encoder are missing, the first {lost[0]}; "
            "expected a model saved with save_pretrained"
        )
