"""The live teacher: a frozen model that is run on every batch."""

import torch
from torch import nn
from transformers import PreTrainedModel

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.records.language import LanguageSignal, SequenceBatch
from stillhouse.students.causal_lm import load_causal_lm, read_output


class LiveTeacher(nn.Module):
    """A causal language model that is always in eval mode and never learns."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> "LiveTeacher":
        """Stay in eval mode: a teacher with dropout on gives another signal every time."""
        super().train(False)
        return self

    @torch.no_grad()
    def forward(self, batch: SequenceBatch) -> LanguageSignal:
        """Return the teacher's hidden states and head at every position of the batch."""
        return read_output(self.model, batch)


def live_teacher(
    data: LanguageData,
    *,
    path: str,
    dtype: str = "float32",
    attn_implementation: str = "sdpa",
) -> LiveTeacher:
    """Load a causal language model as a teacher.

    Args:
        data: its tokenizer must be the teacher's own.
        path: model folder, or an id of the hub.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers` (`sdpa`, `eager`, `flash_attention_2`).

    Raises:
        UserError: when no model lies there, or its tokenizer is another one than the data's.
    """
    model = load_causal_lm(
        path, dtype=dtype, attn_implementation=attn_implementation, key="teacher"
    )
    check_same_tokenizer(path, data.tokenizer, key="teacher")
    return LiveTeacher(model)
