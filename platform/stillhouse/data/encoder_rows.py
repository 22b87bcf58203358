"""From texts to the rows of an encoder's batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stillhouse.data.labelled.task import Example, Label, Task
from stillhouse.errors import UserError
from stillhouse.records.encoders import EncoderBatch

# What a tokenizer calls its rows of ids and of types.
IDS, TYPES = "input_ids", "token_type_ids"


@dataclass(frozen=True)
class EncodedRow:
    """One text, pair or piece of a document as tokens.

    Attributes:
        tokens: ids, special ones included.
        types: of each token, 1 in the second text of a pair; None of a tokenizer without types.
        label: of the text, or None.
        number: which example of its split it is; None of a piece of a document.
        cut: whether tokens were left out for length.
    """

    tokens: Sequence[int]
    types: Sequence[int] | None
    label: Label | None = None
    number: int | None = None
    cut: bool = False


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
) -> list[EncodedRow]:
    """Return every example as one row of at most `length` tokens, in their order.

    Of a pair, tokens are taken from the longer text until it fits.
    """
    whole, cut = _encoded(examples, tokenizer), {}
    longer = [i for i, ids in enumerate(whole[IDS]) if len(ids) > length]
    if longer:
        limits = {"truncation": "longest_first", "max_length": length}
        short = _encoded([examples[i] for i in longer], tokenizer, **limits)
        cut = {i: _row(short, place) for place, i in enumerate(longer)}
    return [
        EncodedRow(*cut.get(i, _row(whole, i)), example.label, i, i in cut)
        for i, example in enumerate(examples)
    ]


def encode_pieces(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, length: int
) -> list[EncodedRow]:
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
    pieces = _encoded(examples, tokenizer, **limits)
    return [EncodedRow(*_row(pieces, i)) for i in range(len(pieces[IDS]))]


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
    numbers = [row.number for row in rows if row.number is not None]
    return EncoderBatch(
        input_ids=padded([row.tokens for row in rows], pad_token),
        attention_mask=padded([[1] * len(row.tokens) for row in rows], 0).bool(),
        token_type_ids=padded(types, 0) if types else None,
        labels=None if task is None else _labels([row.label for row in rows], task),
        rows=torch.tensor(numbers) if numbers else None,
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


def _encoded(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> dict[str, Any]:
    """Tokenise examples together, which is faster; all are pairs, or none is."""
    texts, pairs = [e.text for e in examples], [e.pair for e in examples if e.pair is not None]
    if pairs and len(pairs) < len(texts):
        raise UserError(
            f"data.corpus: {len(pairs)} of {len(texts)} examples are pairs of texts; expected all "
            "or none"
        )
    return dict(tokenizer(texts, pairs or None, verbose=False, **limits))


def _row(encoded: dict[str, Any], place: int) -> tuple[list[int], list[int] | None]:
    types = encoded.get(TYPES)
    return encoded[IDS][place], None if types is None else types[place]
