"""Questions and answers of a data set of the Hugging Face hub."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.corpora.hub import rows_of
from stillhouse.data.corpora.records import filled, listed, string
from stillhouse.data.tasks.answered_files import is_equal, parsed
from stillhouse.data.tasks.checking import said_answer
from stillhouse.data.tasks.exercises import Exercise, Exercises, with_held_out_exercises
from stillhouse.errors import UserError
from stillhouse.ranges import Count

KEY = "data.corpus.exercises"


def answered_hub(
    *,
    id: str,
    config_name: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    instruction_key: str = "instruction",
    input_key: str | None = None,
    context_key: str | None = None,
    answer_key: str = "answer",
    checked: bool = False,
    max_exercises: Count | None = None,
    task: str = "answers",
    licence: str = "unknown",
) -> Exercises:
    """Read exercises with `datasets`.

    Args:
        id: of the data set on the hub, or a folder that `save_to_disk` wrote; a folder in the
            present one is named `./folder`.
        config_name, revision: as in `datasets.load_dataset`.
        train_split: name of the training split, or a slice of it such as `train[:1000]`.
        validation_split, test_split: the same; null holds a tenth of the training ones out.
        instruction_key: column of the question.
        input_key: column of the text that the question is about; it is asked behind the question,
            after a blank line, unless it is empty.
        context_key: column of what the system says before; null, or an empty text, says nothing.
        answer_key: column of the worked answer.
        checked: whether other answers are checked, with `math-verify`, against what the worked one
            says behind its last `####` or `Answer:`; else all are open-ended.
        max_exercises: read the first n of each split only; null reads all.
        task: name of the skill.
        licence: of the texts.

    Raises:
        UserError: for a data set or split that cannot be loaded, a column that is not there, and an
            answer that cannot be learnt or checked; split and row are named.
    """
    if max_exercises is not None and max_exercises < 1:
        raise UserError(f"{KEY}.max_exercises={max_exercises}: expected 1 or more, or null")
    version = {"config_name": config_name, "revision": revision}
    columns = {
        "instruction": instruction_key,
        "input": input_key,
        "context": context_key,
        "answer": answer_key,
    }

    def exercises(key: str, split: str) -> Iterator[Exercise]:
        rows = rows_of(id, key, split, version, prefix=KEY)
        for name, column in columns.items():
            if column is not None and column not in rows.column_names:
                raise UserError(
                    f"{KEY}.{name}_key={column}: the data set {id} has no such column; it has "
                    f"{listed(rows.column_names)}"
                )
        for i, row in enumerate(islice(rows, max_exercises)):
            place = f"{KEY}.id={id}, split {split}, row {i}"
            yield _exercise(row, columns, place, task=task, checked=checked)

    named: dict[Split, str | None] = {"validation": validation_split, "test": test_split}
    return Exercises(
        name=id,
        licence=licence,
        splits=with_held_out_exercises(
            list(exercises("train_split", train_split)),
            {s: list(exercises(f"{s}_split", n)) for s, n in named.items() if n is not None},
            source=f"{KEY}.train_split={train_split}",
            naming=f"{KEY}.{{split}}_split=<split>",
        ),
    )


def _exercise(
    row: dict[str, Any], columns: dict[str, str | None], place: str, *, task: str, checked: bool
) -> Exercise:
    instruction, about, context, answer = (
        None if column is None else row[column] for column in columns.values()
    )
    question = [filled(instruction, repr(columns["instruction"]), place)]
    if about:
        question.append(string(about, repr(columns["input"]), place))
    worked = filled(answer, repr(columns["answer"]), place)
    gold = None
    if checked:
        said = f"what {columns['answer']!r} says behind its last '####' or 'Answer:'"
        way_out = f"set {KEY}.checked=false"
        gold = parsed(said_answer(worked), said, place, open_ended=way_out)
    return Exercise(
        task=task,
        instruction="\n\n".join(question),
        answer=worked,
        place=place,
        context=string(context, repr(columns["context"]), place) if context else None,
        check=None if gold is None else partial(is_equal, gold=gold),
    )
