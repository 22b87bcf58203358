"""What a corpus is: documents, split so that no split leaks into another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stillhouse.data.documents import Document

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Corpus:
    """Documents by split.

    Attributes:
        name: of the corpus, for tables and model cards.
        licence: of its text.
        splits: documents of `train`, `validation` and `test`.
        tokenizer: identity of the tokenizer that made the `TokenDocument`s among them, or None.
    """

    name: str
    licence: str
    splits: Mapping[Split, Sequence[Document]]
    tokenizer: str | None = None

    def documents(self, split: Split) -> Sequence[Document]:
        """Return the documents of a split."""
        return self.splits[split]
