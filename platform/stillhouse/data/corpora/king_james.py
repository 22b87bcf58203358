"""The King James Bible, embedded: 1,189 chapters of public-domain English, 4.1 MB of text.

`king_james.txt.xz` was written by `build_king_james.py` beside it, which says where the text comes
from and how the splits were drawn.
"""

import lzma
from pathlib import Path

from stillhouse.data.corpora.corpus import Corpus, Split

FILE = Path(__file__).with_name("king_james.txt.xz")


def king_james() -> Corpus:
    """Read the corpus; a document is a chapter, its verses a line each, without verse numbers."""
    splits: dict[Split, list[str]] = {"train": [], "validation": [], "test": []}
    with lzma.open(FILE, "rt", encoding="utf-8") as file:
        for chapter in file.read().split("\n\n"):
            header, _, verses = chapter.partition("\n")
            split = header.split("\t")[0]
            splits[split].append(verses.rstrip("\n"))  # type: ignore[index]
    return Corpus(name="King James Bible", licence="public domain", splits=splits)
