"""Where the encoders of `transformers` keep their parts, and how many tokens they take.

What can be read of a model, by the `model_type` of its config:

    type                                              hidden states   attention
    bert, ernie, roberta, xlm-roberta, camembert,     yes             yes
    electra
    distilbert                                        yes             yes; it knows no token types
    deberta, deberta-v2                               yes             refused

DeBERTa adds terms of relative positions to Q K^T, so that its attention is not what queries and
keys say; a record of these would tell a student to match something else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from stillhouse.data.encoders import EncoderData
from stillhouse.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Where a family of encoders keeps its parts.

    Attributes:
        blocks: their list in the body, dotted.
        projections: of queries, keys and values in a block, dotted; None where they do not tell
            the attention.
    """

    blocks: str = "encoder.layer"
    projections: tuple[str, str, str] | None = (
        "attention.self.query",
        "attention.self.key",
        "attention.self.value",
    )


LAYOUTS = {
    "bert": Layout(),
    "ernie": Layout(),
    "roberta": Layout(),
    "xlm-roberta": Layout(),
    "camembert": Layout(),
    "electra": Layout(),
    "distilbert": Layout(
        "transformer.layer", ("attention.q_lin", "attention.k_lin", "attention.v_lin")
    ),
    "deberta": Layout(projections=None),
    "deberta-v2": Layout(projections=None),
}


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """Return the blocks of an encoder, counted from 0."""
    blocks = body_of(model).get_submodule(layout_of(model).blocks)
    assert isinstance(blocks, nn.ModuleList)
    return blocks


def body_of(model: nn.Module) -> PreTrainedModel:
    """Return an encoder without its head; its tensors are the model's own."""
    encoder: Any = model
    return encoder.base_model


def max_tokens(model: nn.Module) -> int | None:
    """Return how many tokens an encoder has positions for; None where it has no table of them."""
    table: Any = getattr(body_of(model).embeddings, "position_embeddings", None)
    if table is None:
        return None
    # RoBERTa counts positions from behind that of padding.
    unused = 0 if table.padding_idx is None else table.padding_idx + 1
    return table.num_embeddings - unused


def check_positions(model: nn.Module, data: EncoderData, *, where: str) -> None:
    """Refuse a model that has fewer positions than the data's texts may have tokens.

    Args:
        model: the model.
        data: its `sequence_length` is the longest text.
        where: the model, for the message.

    Raises:
        UserError: naming both numbers.
    """
    limit = max_tokens(model)
    if limit is not None and data.sequence_length > limit:
        raise UserError(
            f"data.sequence_length={data.sequence_length}: {where} has {limit} positions; expected "
            f"{limit} or less"
        )


def layout_of(model: nn.Module) -> Layout:
    """Return where an encoder of the table keeps its parts."""
    return LAYOUTS[body_of(model).config.model_type]


def projections_of(model: nn.Module, attention_layers: Sequence[int]) -> tuple[str, str, str]:
    """Return where queries, keys and values are made in a block.

    Raises:
        UserError: where they do not tell the attention.
    """
    projections = layout_of(model).projections
    if projections is None:
        known = ", ".join(name for name, layout in LAYOUTS.items() if layout.projections)
        raise UserError(
            f"attention of layers {list(attention_layers)}: a model of the type "
            f"{body_of(model).config.model_type} adds relative positions to what queries and keys "
            f"say, so its attention cannot be matched; take a model of the type {known}"
        )
    return projections
