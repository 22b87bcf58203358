"""Sequences that a model has generated, in place of a corpus' training part."""

import json
from pathlib import Path

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.documents import TokenDocument
from stillhouse.errors import UserError

PROVENANCE = "provenance.json"


def generated(*, generated_path: str, corpus: Corpus) -> Corpus:
    """Read what the stage `generate` wrote; of a sequence, only the continuation is learnt.

    Args:
        generated_path: folder of the data set.
        corpus: its validation and test parts stay what they are.

    Raises:
        UserError: when the folder holds no generated sequences.
    """
    from datasets import load_from_disk

    folder = Path(generated_path)
    try:
        provenance = json.loads((folder / PROVENANCE).read_text())
        rows = load_from_disk(generated_path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"data.corpus.generated_path={folder}: there are no generated sequences that can be "
            "read; expected what the stage `generate` wrote"
        ) from error
    columns = zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
    documents = [
        TokenDocument(
            [*prompt, *completion],
            [False] * len(prompt) + [True] * len(completion),
            follows_end=False,
        )
        for prompt, completion in columns
    ]
    return Corpus(
        name=f"{corpus.name}, continued by a model",
        licence=corpus.licence,
        splits={**corpus.splits, "train": documents},
        tokenizer=provenance["tokenizer_sha256"],
    )
