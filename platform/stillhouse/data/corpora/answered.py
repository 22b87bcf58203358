"""Exercises as a corpus of conversations."""

from stillhouse.data.corpora.corpus import Corpus
from stillhouse.data.tasks.exercises import Exercises


def answered(*, exercises: Exercises) -> Corpus:
    """Return every exercise as a question with its label, in the order of the exercises."""
    return Corpus(
        name=exercises.name,
        licence=exercises.licence,
        splits={s: [e.answered(e.answer) for e in part] for s, part in exercises.splits.items()},
    )
