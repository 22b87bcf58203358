"""Answers that a model has rewritten, in place of the labels of the training exercises."""

import json
from pathlib import Path
from typing import Any

from stillhouse.data.corpora.answered import answered
from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.corpora.generated import PROVENANCE
from stillhouse.data.tasks.exercises import Exercise, Exercises
from stillhouse.errors import UserError


def rewritten(*, rewritten_path: str, exercises: Exercises) -> Corpus:
    """Read what the stage `rewrite` wrote; a question is asked without its reference.

    Args:
        rewritten_path: folder of the data set.
        exercises: whose training part was rewritten; their validation and test parts stay.

    Raises:
        UserError: when the folder holds no rewritten answers, or those of other exercises.
    """
    from datasets import load_from_disk

    place = f"data.corpus.rewritten_path={rewritten_path}"
    try:
        provenance = json.loads((Path(rewritten_path) / PROVENANCE).read_text())
        rows: Any = load_from_disk(rewritten_path)
        names = ("task", "instruction", "target", "context")
        columns = list(zip(*(rows[name] for name in names), strict=True))
        made_of = provenance["exercises_sha256"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{place}: there are no rewritten answers that can be read; expected what the stage "
            "`rewrite` wrote"
        ) from error
    if made_of != exercises.identity("train"):
        raise UserError(
            f"{place}: the answers are of other training exercises than data.corpus.exercises; "
            "name the same ones in both"
        )
    train = [
        Exercise(task, instruction, target, f"{place}, row {i}", context)
        for i, (task, instruction, target, context) in enumerate(columns)
    ]
    labelled = answered(exercises=exercises)
    return Corpus(
        name=f"{exercises.name}, rewritten by a model",
        licence=exercises.licence,
        splits={**labelled.splits, "train": [e.answered(e.answer) for e in train]},
    )
