"""From texts to the rows of an encoder's batches."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stillhouse.data.labelled.task import Example, Label, Task
from stillhouse.errors import UserError
from stillhouse.records.encoders import EncoderBatch

# What a tokenizer calls its rows of ids and of types.
IDS, TYPES = "input_ids", "token_type_ids"
# Of texts that are tokenised together: faster than one by one, and few lists of numbers at once.
CHARACTERS = 1_000_000


@dataclass(frozen=True)
class EncodedRow:
    """One text, pair or piece of a document as tokens.

    Attributes:
        tokens: ids, special ones included.
        types: of each token, 1 in the second text of a pair; None of a tokenizer without types.
        label: of the text, or None.
        cut: whether tokens were left out for length.
    """

    tokens: Sequence[int]
    types: Sequence[int] | None
    label: Label | None = None
    cut: bool = False


class PackedRows(Sequence[EncodedRow]):
    """Rows, their tokens end to end in arrays: 5 bytes each, where Python's lists take hundreds.

    A row is made when it is asked for.
    """

    def __init__(self, rows: Iterable[EncodedRow]) -> None:
        self._tokens, self._types, self._ends = array("i"), array("B"), array("q", [0])
        self._labels: list[Label | None] = []
        self._cut = bytearray()
        for row in rows:
            self._tokens.extend(row.tokens)
            self._types.extend(row.types or ())
            self._ends.append(len(self._tokens))
            self._labels.append(row.label)
            self._cut.append(row.cut)

    @property
    def cut(self) -> list[int]:
        """Places of the rows of which tokens were left out."""
        return [place for place, cut in enumerate(self._cut) if cut]

    def __len__(self) -> int:
        return len(self._labels)

    @overload
    def __getitem__(self, index: int) -> EncodedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[EncodedRow]: ...

    def __getitem__(self, index: int | slice) -> EncodedRow | list[EncodedRow]:
        """Return row `index`, or the rows of a slice."""
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        tokens = slice(self._ends[places], self._ends[places + 1])
        types = self._types[tokens].tolist() if self._types else None
        return EncodedRow(
            self._tokens[tokens].tolist(), types, self._labels[places], bool(self._cut[places])
        )


class Rows:
    """Rows as a source of samples; nothing about them is random."""

    def __init__(self, rows: Sequence[EncodedRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def sample(self, index: int, generator: torch.Generator) -> EncodedRow:
        """Return row `index`."""
        return self.rows[index]


def encode_examples(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int
) -> PackedRows:
    """Return every example as one row of at most `length` tokens, in their order.

    Of a pair, tokens are taken from the longer text until it fits.

    Raises:
        UserError: when only some of the examples are pairs.
    """
    pairs = sum(example.pair is not None for example in examples)
    if 0 < pairs < len(examples):
        raise UserError(
            f"data.corpus: {pairs} of {len(examples)} examples are pairs of texts; expected all "
            "or none"
        )
    blocks = _blocks(examples)
    return PackedRows(row for block in blocks for row in _fitted(block, tokenizer, length))


def _fitted(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int
) -> Iterator[EncodedRow]:
    """Yield examples as rows, those that are too long cut."""
    whole, cut = _encoded(examples, tokenizer), {}
    longer = [i for i, ids in enumerate(whole[IDS]) if len(ids) > length]
    if longer:
        limits = {"truncation": "longest_first", "max_length": length}
        short = _encoded([examples[i] for i in longer], tokenizer, **limits)
        cut = {i: _row(short, place) for place, i in enumerate(longer)}
    for i, example in enumerate(examples):
        yield EncodedRow(*cut.get(i, _row(whole, i)), example.label, i in cut)


def encode_pieces(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int
) -> PackedRows:
    """Return documents as rows of at most `length` tokens, cut where one is full.

    Raises:
        UserError: for a tokenizer that does not cut texts in this way.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"data.tokenizer_path={tokenizer.name_or_path}: the tokenizer cannot cut documents "
            "into pieces; name one with a tokenizer.json"
        )
    limits = {"truncation": True, "max_length": length, "return_overflowing_tokens": True}
    cut = (_encoded(block, tokenizer, **limits) for block in _blocks(examples))
    return PackedRows(EncodedRow(*_row(of, i)) for of in cut for i in range(len(of[IDS])))


def collate_rows(
    rows: Sequence[EncodedRow], *, pad_token: int, pad_left: bool, task: Task | None
) -> EncoderBatch:
    """Pad rows to the longest of them.

    Args:
        rows: of one split.
        pad_token: id at padded positions; its type is 0.
        pad_left: whether these come first.
        task: what labels say; None of text without them.
    """
    longest = max(len(row.tokens) for row in rows)

    def padded(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
        filled = []
        for sequence in sequences:
            padding = [value] * (longest - len(sequence))
            filled.append([*padding, *sequence] if pad_left else [*sequence, *padding])
        return torch.tensor(filled)

    types = [row.types for row in rows if row.types is not None]
    return EncoderBatch(
        input_ids=padded([row.tokens for row in rows], pad_token),
        attention_mask=padded([[1] * len(row.tokens) for row in rows], 0).bool(),
        token_type_ids=padded(types, 0) if types else None,
        labels=None if task is None else _labels([row.label for row in rows], task),
    )


def _labels(labels: Sequence[Label | None], task: Task) -> Tensor | None:
    """Return class indices, numbers, or a row of zeros and ones for several labels."""
    if any(label is None for label in labels):
        return None
    if task.kind == "multi_label":
        marks = torch.zeros(len(labels), task.num_labels)
        for row, label in enumerate(labels):
            assert isinstance(label, tuple)
            marks[row, list(label)] = 1.0
        return marks
    kind = torch.float32 if task.kind == "regression" else torch.long
    return torch.tensor(labels, dtype=kind)


def _blocks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Yield examples that stand together, of at most `CHARACTERS`, or a longer one alone."""
    block: list[Example] = []
    size = 0
    for example in examples:
        length = len(example.text) + len(example.pair or "")
        if block and size + length > CHARACTERS:
            yield block
            block, size = [], 0
        block.append(example)
        size += length
    if block:
        yield block


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> dict[str, Any]:
    """Tokenise examples together; all are pairs, or none is."""
    texts, pairs = [e.text for e in examples], [e.pair for e in examples if e.pair is not None]
    return dict(tokenizer(texts, pairs or None, verbose=False, **limits))


def _row(encoded: dict[str, Any], place: int) -> tuple[list[int], list[int] | None]:
    types = encoded.get(TYPES)
    return encoded[IDS][place], None if types is None else types[place]
