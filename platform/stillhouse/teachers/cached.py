"""The cached teacher: a signal that was computed once and is read from disk."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from stillhouse.data.language import LanguageData
from stillhouse.errors import UserError
from stillhouse.records.language import (
    LanguageOutput,
    LanguageSignal,
    SequenceBatch,
    VocabularyHead,
)
from stillhouse.teachers.codecs import Codec
from stillhouse.teachers.signals import (
    SignalReader,
    check_source,
    read_head,
    read_index,
    refuse_shifted_windows,
    source_of,
)


class CachedTeacher(nn.Module):
    """Says what the teacher said of the same windows; it has no parameters and runs no model."""

    def __init__(
        self,
        reader: SignalReader,
        codec: Codec,
        vocabulary_size: int,
        head: VocabularyHead | None,
        *,
        layers: Sequence[int] = (),
        keep_residual: bool = True,
    ) -> None:
        super().__init__()
        self.reader = reader
        self.codec = codec
        self.vocabulary_size = vocabulary_size
        self.head = head
        self.layers = layers
        self.keep_residual = keep_residual

    @torch.no_grad()
    def forward(self, batch: SequenceBatch) -> LanguageSignal:
        """Look the batch's windows up; positions that are not learnt hold zeros."""
        assert batch.windows is not None, "refuse_shifted_windows has seen to it"
        # What is stored in float16 is joined as it is: autocast on a CPU does not know that type.
        with torch.autocast("cpu", enabled=False):
            rows = self.reader.rows(batch.windows.tolist())
        head = self._head_on(batch.input_ids.device)
        signal = self.codec.decode(rows, self.vocabulary_size, head)
        layers = {n: _laid_out(signal.layers[n], batch.mask) for n in self.layers}
        if isinstance(signal, LanguageOutput):
            return LanguageOutput(
                hidden_states=_laid_out(signal.hidden_states, batch.mask),
                head=signal.head,
                layers=layers,
            )
        residual = signal.log_residual
        if not self.keep_residual:
            residual = torch.full_like(residual, -torch.inf)
        return replace(
            signal,
            token_ids=_laid_out(signal.token_ids, batch.mask),
            log_probs=_laid_out(signal.log_probs, batch.mask),
            log_residual=_laid_out(residual, batch.mask),
            tail_ids=_laid_out(signal.tail_ids, batch.mask),
            tail_entropy=_laid_out(signal.tail_entropy, batch.mask),
            layers=layers,
        )

    def _head_on(self, device: torch.device) -> VocabularyHead | None:
        if self.head is not None and self.head.weight.device != device:
            bias = self.head.bias
            self.head = replace(
                self.head,
                weight=self.head.weight.to(device),
                bias=None if bias is None else bias.to(device),
            )
        return self.head


def _laid_out(rows: Tensor, mask: Tensor) -> Tensor:
    """Put rows [n, …] at the n places [B, T] where `mask` is True."""
    laid_out = torch.zeros(*mask.shape, *rows.shape[1:], dtype=rows.dtype, device=mask.device)
    laid_out[mask] = rows.to(mask.device)
    return laid_out


def cached_teacher(
    data: LanguageData,
    *,
    path: str,
    signal_path: str,
    codec: Codec,
    layers: Sequence[int] | None = None,
    keep_residual: bool = True,
) -> CachedTeacher:
    """Open the signal that the stage `cache` wrote.

    Args:
        data: the training windows must be those that the signal was computed on.
        path: the teacher that it must be of, a model folder or an id of the hub.
        signal_path: folder of the signal.
        codec: how it must be stored.
        layers: whose hidden states it carries besides, of those that were stored. None: no others.
        keep_residual: whether the mass outside the k kept tokens is a symbol of its own
            (`objectives.top_k`); without it the kept probabilities are blown up to sum to 1 and the
            student's tail is driven to 0.

    Raises:
        UserError: when the signal is of another teacher, tokenizer, data or codec, is damaged, has
            no such layer, or windows are shifted.
    """
    refuse_shifted_windows(data)
    folder = Path(signal_path)
    index = read_index(folder, key="teacher.signal_path")
    check_source(index.source, source_of(path, data, codec), folder, key="teacher.signal_path")
    layers = tuple(layers or ())
    if not set(layers) <= set(index.layers):
        raise UserError(
            f"teacher.layers={list(layers)}: the signal in {folder} has the layers {index.layers}; "
            "set stages.cache.teacher.layers to them, too"
        )
    return CachedTeacher(
        SignalReader(folder, index, data.windows("train").learned_lengths()),
        codec,
        index.vocabulary_size,
        read_head(folder) if codec.keeps_head else None,
        layers=layers,
        keep_residual=keep_residual,
    )
