"""The live teacher of encoders: a frozen model that is run on every batch."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from stillhouse.data.encoders import EncoderData
from stillhouse.records.encoders import EncoderBatch, EncoderOutput
from stillhouse.students.encoders import check_fits, has_head, load_encoder, read_encoder


class LiveEncoder(nn.Module):
    """An encoder that is always in eval mode and never learns."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.train(False)

    @property
    def config(self) -> PretrainedConfig:
        """The teacher's shape."""
        return self.model.config

    def train(self, mode: bool = True) -> "LiveEncoder":
        """Stay in eval mode: a teacher with dropout on gives another signal every time."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(
        self,
        batch: EncoderBatch,
        hidden_layers: Sequence[int] = (),
        attention_layers: Sequence[int] = (),
    ) -> EncoderOutput:
        """Return what the teacher says of a batch, under its own numbers of layers.

        Args:
            batch: the texts.
            hidden_layers, attention_layers: as in `read_encoder`.
        """
        return read_encoder(
            self.model, batch, hidden_layers=hidden_layers, attention_layers=attention_layers
        )


def live_encoder(
    data: EncoderData,
    *,
    path: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> LiveEncoder:
    """Load an encoder as a teacher.

    It has logits where the data have a task and the folder a head; a head is never made up.

    Args:
        data: its tokenizer must be the teacher's own.
        path: model folder, or an id of the hub.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers`.

    Raises:
        UserError: as `load_encoder` and `check_fits`.
    """
    task = data.task if has_head(path, key="teacher") else None
    model = load_encoder(
        path, task=task, dtype=dtype, attn_implementation=attn_implementation, key="teacher"
    )
    check_fits(model, data, path=path, key="teacher")
    return LiveEncoder(model)
