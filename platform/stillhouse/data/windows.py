"""Windows over tokenised documents, and batches of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.records.language import SequenceBatch


@dataclass(frozen=True)
class Window:
    """A stretch of tokens and what follows each of them.

    Attributes:
        input_ids: [n].
        labels: [n], the next tokens.
    """

    input_ids: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]


class TokenWindows:
    """A text as windows of at most `length` tokens, every token predicted exactly once.

    Documents stand in one row, each preceded by the end token, which so doubles as the start:
    the first token of a document is predicted too. Packed windows run across documents and are
    all full but the last; without packing, a window ends with its document.
    """

    def __init__(
        self,
        documents: Sequence[Sequence[int]],
        *,
        length: int,
        end_token: int,
        packing: bool,
        shift_windows: bool = False,
    ) -> None:
        """Lay out the windows.

        Args:
            documents: token ids of each document, without end tokens.
            length: T, the longest window.
            end_token: stands between documents, before the first and after the last.
            packing: whether windows run across documents.
            shift_windows: whether a sample starts at a random offset below `length`, drawn anew in
                every epoch, so that documents are not always cut at the same places.

        Raises:
            UserError: when windows are to be shifted that are not packed.
        """
        if shift_windows and not packing:
            raise UserError(
                "data.shift_windows=true needs data.packing=true: without packing a window starts "
                "with its document"
            )
        row: list[int] = [end_token]
        spans: list[tuple[int, int]] = []
        for document in documents:
            start = len(row) - 1
            row.extend(document)
            row.append(end_token)
            if not packing:
                spans += _cut(start, len(row) - 1, length)
        if packing:
            spans = _cut(0, len(row) - 1, length)
        self.tokens = torch.tensor(row, dtype=torch.int32)
        self.spans = spans
        self.length = length
        self.shift_windows = shift_windows

    def __len__(self) -> int:
        return len(self.spans)

    def sample(self, index: int, generator: torch.Generator) -> Window:
        """Return window `index`, shifted at random where that is asked for."""
        start, stop = self.spans[index]
        if self.shift_windows:
            room = min(self.length, len(self.tokens) - stop)
            shift = int(torch.randint(room, (), generator=generator))
            start, stop = start + shift, stop + shift
        return self.window(start, stop)

    def window(self, start: int, stop: int) -> Window:
        """Return the tokens start..stop-1 and their successors."""
        stretch = self.tokens[start : stop + 1].long()
        return Window(input_ids=stretch[:-1], labels=stretch[1:])

    def in_order(self) -> list[Window]:
        """Return all windows in the order of the text, unshifted."""
        return [self.window(start, stop) for start, stop in self.spans]


def _cut(start: int, stop: int, length: int) -> list[tuple[int, int]]:
    return [(s, min(s + length, stop)) for s in range(start, stop, length)]


def collate_windows(windows: Sequence[Window], *, pad_token: int) -> SequenceBatch:
    """Pad windows on the right to the longest of them.

    The masks come from the lengths, never from the token ids: a pad token that equals the end
    token hides no end token.
    """
    lengths = torch.tensor([len(w.input_ids) for w in windows])
    longest = int(lengths.max())
    input_ids = torch.full((len(windows), longest), pad_token, dtype=torch.long)
    labels = torch.full((len(windows), longest), pad_token, dtype=torch.long)
    for row, window in enumerate(windows):
        input_ids[row, : lengths[row]] = window.input_ids
        labels[row, : lengths[row]] = window.labels
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    padding = None if bool(mask.all()) else mask
    return SequenceBatch(input_ids=input_ids, labels=labels, mask=mask, attention_mask=padding)
