"""The cached teacher of encoders: a signal that was computed once and is read from disk."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.encoders import EncoderData
from stillhouse.errors import UserError
from stillhouse.records.encoders import EncoderBatch, EncoderOutput
from stillhouse.students.encoders import stored_config
from stillhouse.teachers.encoder_signals import (
    ANEW,
    EncoderSignalReader,
    keys_of,
    read_index,
    source_of,
)

KEY = "teacher.signal_path"
SPLITS: tuple[Split, ...] = ("train", "validation")
OR_LIVE = f"{ANEW}, or take teacher=encoder"


class CachedEncoder(nn.Module):
    """Says what the teacher said of the same texts; it has no parameters and runs no model.

    On a batch as it was cached, that is what the live teacher says to the bit; in batches of other
    widths, to rounding: there, the live teacher's own sums have another order.
    """

    def __init__(self, reader: EncoderSignalReader, folder: Path, config: Any) -> None:
        super().__init__()
        self.reader = reader
        self.folder = folder
        self.config = config

    @torch.no_grad()
    def forward(
        self,
        batch: EncoderBatch,
        hidden_layers: Sequence[int] = (),
        attention_layers: Sequence[int] = (),
    ) -> EncoderOutput:
        """Look a batch's texts up; positions of padding hold zeros.

        Args:
            batch: the texts.
            hidden_layers, attention_layers: the teacher's, as in `read_encoder`.

        Raises:
            UserError: for a layer or a text that was not cached.
        """
        index = self.reader.index
        for asked, there in (
            (hidden_layers, index.hidden_layers),
            (attention_layers, index.attention_layers),
        ):
            if missing := sorted(set(asked) - set(there)):
                raise UserError(
                    f"{KEY}={self.folder}: the signal has the teacher's layers {there}, not "
                    f"{missing}; give its stage the fit's layer_map and student_layers, and "
                    f"{OR_LIVE}"
                )
        keys = keys_of(batch)
        if lost := sum(key not in self.reader for key in keys):
            raise UserError(_lost(self.folder, f"{lost} of {len(keys)} texts of a batch"))
        said = self.reader.read(batch, keys)
        return EncoderOutput(
            {layer: said.hidden_states[layer] for layer in hidden_layers},
            {layer: said.attention[layer] for layer in attention_layers},
            said.logits,
        )


def cached_encoder(data: EncoderData, *, path: str, signal_path: str) -> CachedEncoder:
    """Open the signal that the stage `cache_encoder` wrote.

    Args:
        data: every text of their training and validation parts must be in it.
        path: the teacher that it must be of, a model folder or an id of the hub.
        signal_path: folder of the signal.

    Raises:
        UserError: when the signal is of another teacher, tokenizer or texts, or is damaged.
    """
    folder = Path(signal_path)
    index = read_index(folder, key=KEY)
    wanted = source_of(path, data.tokenizer)
    if index.source.teacher != wanted.teacher:
        raise UserError(
            f"{KEY}={folder}: the signal is of another teacher; it has to be that of "
            f"teacher.path; {OR_LIVE}"
        )
    if index.source.tokenizer != wanted.tokenizer:
        raise UserError(
            f"{KEY}={folder}: the signal is over another tokenizer's vocabulary; it has to be that "
            f"of data.tokenizer_path; {OR_LIVE}"
        )
    reader = EncoderSignalReader(folder, index)
    for split in SPLITS:
        keys = [key for batch in data.evaluation_batches(split) for key in keys_of(batch)]
        if lost := sum(key not in reader for key in keys):
            raise UserError(_lost(folder, f"{lost} of {len(keys)} texts of {split}"))
    return CachedEncoder(reader, folder, stored_config(path, key="teacher"))


def _lost(folder: Path, what: str) -> str:
    return (
        f"{KEY}={folder}: {what} were not cached; data.corpus, data.sequence_length, "
        f"data.train_labels and the stage's splits decide them; {OR_LIVE}"
    )
