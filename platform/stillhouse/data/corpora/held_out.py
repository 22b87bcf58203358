"""Holding documents out of training where a corpus comes without validation or test parts."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.documents import Conversation, Document
from stillhouse.errors import UserError

HELD_OUT: tuple[Split, ...] = ("validation", "test")


def with_held_out(
    train: Sequence[Document],
    given: Mapping[Split, Sequence[Document]],
    *,
    held_out: float,
    naming: str,
) -> dict[Split, Sequence[Document]]:
    """Return all three splits, those that are not given held out of the training documents.

    A document's split is decided by the hash of its content: whatever else is there and in which
    order, it stays in its split, and documents that are equal stay together.

    Args:
        train: the training documents.
        given: the validation and test documents that the corpus has by itself.
        held_out: share of the documents for each split that is not given.
        naming: how a user names a split's own documents, `{split}` standing for the split.

    Raises:
        UserError: for a share that leaves a split empty, training included.
    """
    missing: list[Split] = [split for split in HELD_OUT if split not in given]
    if missing and not 0 < held_out < 0.5:
        raise UserError(
            f"data.corpus.held_out={held_out}: expected more than 0 and less than 0.5, the share "
            f"of the documents for {' and for '.join(missing)}"
        )
    parts: dict[Split, list[Document]] = {"train": []}
    parts |= {split: [] for split in missing}
    for document in train:
        parts[_split_of(document, held_out, missing)].append(document)
    for split, documents in parts.items():
        if not documents:
            own = " or ".join(naming.format(split=s) for s in missing)
            raise UserError(
                f"data.corpus.held_out={held_out}: of {len(train)} documents none falls to "
                f"{split}; set another share, give more documents, or name {own}"
            )
    return {**parts, **given}


def _split_of(document: Document, held_out: float, missing: Sequence[Split]) -> Split:
    place = _uniform(document)
    for split in missing:
        # The test's stretch of hashes is the same whether or not validation is given.
        first = HELD_OUT.index(split) * held_out
        if first <= place < first + held_out:
            return split
    return "train"


def _uniform(document: Document) -> float:
    """Return a number in [0, 1) that a document's content decides."""
    content = list(document.messages) if isinstance(document, Conversation) else document
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
