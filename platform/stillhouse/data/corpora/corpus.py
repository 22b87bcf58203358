"""What a corpus is: documents, split so that no split leaks into another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Corpus:
    """Documents of plain text by split.

    Attributes:
        name: of the corpus, for tables and model cards.
        licence: of its text.
        splits: documents of `train`, `validation` and `test`.
    """

    name: str
    licence: str
    splits: Mapping[Split, list[str]]

    def documents(self, split: Split) -> list[str]:
        """Return the documents of a split."""
        return self.splits[split]
