"""Windows over tokenised documents, and batches of them."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from stillhouse.data.documents import TokenDocument
from stillhouse.errors import UserError
from stillhouse.records.language import SequenceBatch


@dataclass(frozen=True)
class Window:
    """A stretch of tokens and what follows each of them.

    Attributes:
        input_ids: [n].
        labels: [n], the next tokens.
        learned: [n]; True where the label counts.
        index: which window of the split it is; None for one that was drawn at random.
    """

    input_ids: Int[Tensor, "n"]
    labels: Int[Tensor, "n"]
    learned: Bool[Tensor, "n"]
    index: int | None = None


class TokenWindows:
    """Documents as windows of at most `length` tokens, every learnt token predicted exactly once.

    Documents stand in one row; a text is preceded by the end token, which so doubles as the start:
    its first token is predicted too. Packed windows run across documents and are all full but the
    last; without packing, a window ends with its document. A document longer than a window is cut
    into several, and windows without a token to learn are left out.
    """

    def __init__(
        self,
        documents: Sequence[TokenDocument],
        *,
        length: int,
        end_token: int,
        packing: bool,
        shift_windows: bool = False,
    ) -> None:
        """Lay out the windows.

        Args:
            documents: the documents as tokens.
            length: T, the longest window.
            end_token: stands before a document that asks for it.
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
        row: list[int] = []
        learned: list[bool] = []
        spans: list[tuple[int, int]] = []
        for document in documents:
            if document.follows_end and (not row or row[-1] != end_token):
                row.append(end_token)
                learned.append(False)
            start = len(row) - document.follows_end
            row.extend(document.tokens)
            learned.extend(document.learned)
            if not packing:
                spans += _cut(start, len(row) - 1, length)
        if packing:
            spans = _cut(0, len(row) - 1, length)
        self.tokens = torch.tensor(row, dtype=torch.int32)
        self.learned = torch.tensor(learned, dtype=torch.bool)
        self.spans = spans
        self.spans = [span for span, n in zip(spans, self.learned_lengths(), strict=True) if n]
        self.length = length
        self.shift_windows = shift_windows

    def __len__(self) -> int:
        return len(self.spans)

    def sample(self, index: int, generator: torch.Generator) -> Window:
        """Return window `index`, shifted at random where that is asked for."""
        start, stop = self.spans[index]
        if not self.shift_windows:
            return self._window(start, stop, index)
        room = min(self.length, len(self.tokens) - stop)
        shift = int(torch.randint(room, (), generator=generator))
        return self._window(start + shift, stop + shift, None)

    def _window(self, start: int, stop: int, index: int | None) -> Window:
        """Return the tokens start..stop-1 and their successors."""
        stretch = self.tokens[start : stop + 1].long()
        learned = self.learned[start + 1 : stop + 1]
        return Window(input_ids=stretch[:-1], labels=stretch[1:], learned=learned, index=index)

    def in_order(self, indices: Sequence[int] | None = None) -> list[Window]:
        """Return windows in the order of the text, unshifted; all of them where none are named."""
        wanted = range(len(self.spans)) if indices is None else indices
        return [self.window(i) for i in wanted]

    def window(self, index: int) -> Window:
        """Return window `index`, unshifted."""
        return self._window(*self.spans[index], index)

    def learned_lengths(self) -> list[int]:
        """Return how many tokens are learnt of every window."""
        sums = torch.cat([torch.zeros(1, dtype=torch.long), self.learned.cumsum(0)])
        starts, stops = torch.tensor(self.spans, dtype=torch.long).reshape(-1, 2).T + 1
        return (sums[stops] - sums[starts]).tolist()

    def identity(self) -> str:
        """Return the hash of every window's tokens and of what is learnt of them."""
        digest = hashlib.sha256(np.asarray(self.spans, dtype=np.int64).tobytes())
        digest.update(self.tokens.numpy().tobytes())
        digest.update(self.learned.numpy().tobytes())
        return digest.hexdigest()


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
    mask = torch.zeros((len(windows), longest), dtype=torch.bool)
    for row, window in enumerate(windows):
        input_ids[row, : lengths[row]] = window.input_ids
        labels[row, : lengths[row]] = window.labels
        mask[row, : lengths[row]] = window.learned
    real = torch.arange(longest) < lengths.unsqueeze(1)
    indices = [w.index for w in windows if w.index is not None]
    return SequenceBatch(
        input_ids=input_ids,
        labels=labels,
        mask=mask,
        attention_mask=None if bool(real.all()) else real,
        windows=torch.tensor(indices) if len(indices) == len(windows) else None,
    )


def batch_of_documents(
    documents: Sequence[TokenDocument], *, end_token: int, pad_token: int
) -> SequenceBatch:
    """Return whole documents as the rows of one batch, in their order."""
    windows = TokenWindows(
        documents,
        length=max(len(document.tokens) for document in documents),
        end_token=end_token,
        packing=False,
        shift_windows=False,
    )
    return collate_windows(windows.in_order(), pad_token=pad_token)
