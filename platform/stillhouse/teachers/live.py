"""The live teacher: a frozen model that is run on every batch."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.errors import UserError
from stillhouse.records.language import LanguageOutput, SequenceBatch
from stillhouse.students.causal_lm import load_causal_lm, read_output


class LiveTeacher(nn.Module):
    """A causal language model that is always in eval mode and never learns."""

    def __init__(self, model: PreTrainedModel, layers: Sequence[int] = ()) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.layers = layers
        self.train(False)

    def train(self, mode: bool = True) -> "LiveTeacher":
        """Stay in eval mode: a teacher with dropout on gives another signal every time."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, batch: SequenceBatch) -> LanguageOutput:
        """Return the teacher's hidden states and head at every position of the batch."""
        return read_output(self.model, batch, layers=self.layers)


def live_teacher(
    data: LanguageData,
    *,
    path: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
    layers: Sequence[int] | None = None,
) -> LiveTeacher:
    """Load a causal language model as a teacher.

    Args:
        data: its tokenizer must be the teacher's own.
        path: model folder, or an id of the hub.
        dtype: torch dtype of the weights; `auto` keeps the stored one. A model whose own config
            says how it is quantised stays quantised.
        attn_implementation: attention of `transformers` (`sdpa`, `eager`, `flash_attention_2`).
        layers: whose hidden states the signal carries besides the last ones: 0 the embeddings, i
            what block i hands on. None: no others.

    Raises:
        UserError: when no model lies there, its tokenizer is another one than the data's, or it has
            no such layer.
    """
    model = load_causal_lm(
        path, dtype=dtype, attn_implementation=attn_implementation, key="teacher"
    )
    check_same_tokenizer(path, data.tokenizer, key="teacher")
    layers = tuple(layers or ())
    depth = int(model.config.num_hidden_layers)
    if not all(0 <= layer <= depth for layer in layers):
        raise UserError(f"teacher.layers={list(layers)}: {path} has the layers 0 to {depth}")
    return LiveTeacher(model, layers)
