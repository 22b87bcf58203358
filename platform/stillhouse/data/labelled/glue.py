"""The tasks of GLUE (1804.07461), from the Hugging Face hub.

The labels of GLUE's own test parts are not public: its validation part is the test part here, of
MNLI the matched one, and validation is held out of the training part.
"""

from itertools import islice
from pathlib import Path
from typing import NamedTuple

from stillhouse.data.corpora.hub import rows_of
from stillhouse.data.corpora.records import filled, listed
from stillhouse.data.labelled.made_up import made_up
from stillhouse.data.labelled.task import Example, LabelledText, Task, held_out_by_content
from stillhouse.errors import UserError, did_you_mean
from stillhouse.ranges import Count

KEY = "data.corpus"


class Columns(NamedTuple):
    """Where a task's rows hold text and pair, and what its labels say."""

    text: str
    pair: str | None
    task: Task
    test_split: str = "validation"


def _classes(*names: str) -> Task:
    return Task("classification", names)


ENTAILS = _classes("entailment", "not_entailment")
PARAPHRASES = _classes("not_equivalent", "equivalent")
TASKS = {
    "cola": Columns("sentence", None, _classes("unacceptable", "acceptable")),
    "sst2": Columns("sentence", None, _classes("negative", "positive")),
    "mrpc": Columns("sentence1", "sentence2", PARAPHRASES),
    "qqp": Columns("question1", "question2", _classes("not_duplicate", "duplicate")),
    "stsb": Columns("sentence1", "sentence2", Task("regression", ("similarity",))),
    "mnli": Columns(
        "premise",
        "hypothesis",
        _classes("entailment", "neutral", "contradiction"),
        "validation_matched",
    ),
    "qnli": Columns("question", "sentence", ENTAILS),
    "rte": Columns("sentence1", "sentence2", ENTAILS),
    "wnli": Columns("sentence1", "sentence2", _classes("not_entailment", "entailment")),
}


def glue(
    *,
    task: str,
    id: str = "nyu-mll/glue",
    revision: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    max_examples: Count | None = None,
    licence: str = "as of each task",
    synthetic: bool = False,
) -> LabelledText:
    """Read one task with `datasets`.

    Args:
        task: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte or wnli.
        id: of the data set on the hub, or a folder that `save_to_disk` wrote of one task.
        revision: as in `datasets.load_dataset`.
        train_split: name of the training split, or a slice of it such as `train[:1000]`.
        test_split: the same, of a split with labels; null takes the validation split.
        max_examples: read the first n examples of each split only; null reads all.
        licence: of the texts.
        synthetic: read nothing; make random texts of the same kind.

    Raises:
        UserError: for a task that GLUE does not have, a split that cannot be loaded, a column that
            is not there, and a row that cannot be used; split and row are named.
    """
    if task not in TASKS:
        raise UserError(
            f"{KEY}.task={task}: GLUE has no such task; expected one of {', '.join(TASKS)}"
            f"{did_you_mean(task, TASKS)}"
        )
    if max_examples is not None and max_examples < 1:
        raise UserError(f"{KEY}.max_examples={max_examples}: expected 1 or more, or null")
    columns = TASKS[task]
    if synthetic:
        return made_up(f"GLUE {task}", columns.task, pairs=columns.pair is not None)
    # A saved folder is one task already.
    config_name = None if Path(id).expanduser().is_dir() else task
    version = {"config_name": config_name, "revision": revision}

    def examples(key: str, split: str) -> list[Example]:
        rows = rows_of(id, key, split, version, prefix=KEY)
        for column in (columns.text, columns.pair, "label"):
            if column is not None and column not in rows.column_names:
                raise UserError(
                    f"{KEY}.id={id}: split {split} has no column {column!r}, where {task} holds "
                    f"its texts and labels; it has {listed(rows.column_names)}"
                )
        place = f"{KEY}.id={id}, split {split}, row"
        return [
            _example(row, columns, f"{place} {i}")
            for i, row in enumerate(islice(rows, max_examples))
        ]

    train = examples("train_split", train_split)
    test = examples("test_split", test_split or columns.test_split)
    splits = held_out_by_content(train, {"test": test}, source=f"{KEY}.train_split={train_split}")
    return LabelledText(f"GLUE {task}", licence, columns.task, splits)


def _example(row: dict[str, object], columns: Columns, place: str) -> Example:
    if row["label"] == -1:
        raise UserError(
            f"{place}: the label is hidden, as in all of GLUE's own test splits; name a split with "
            "labels"
        )
    pair = columns.pair
    return Example(
        filled(row[columns.text], repr(columns.text), place),
        None if pair is None else filled(row[pair], repr(pair), place),
        columns.task.label(row["label"], place),
    )
