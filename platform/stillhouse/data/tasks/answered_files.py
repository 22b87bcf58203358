"""A user's own questions and answers, in JSON lines."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.corpora.lines import json_records
from stillhouse.data.corpora.records import filled, kind_of, listed, string
from stillhouse.data.tasks.checking import said_answer
from stillhouse.data.tasks.exercises import Exercise, Exercises, with_held_out_exercises
from stillhouse.errors import UserError

KEY = "data.corpus.exercises"
# Letters in a row that are no command of LaTeX.
WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
EXAMPLE = '{"instruction": "…", "answer": "…"}'


def answered_files(
    *,
    train_path: str,
    validation_path: str | None = None,
    test_path: str | None = None,
    task: str = "answers",
    name: str | None = None,
    licence: str = "unknown",
) -> Exercises:
    """Read exercises: a line holds `instruction`, `answer`, and perhaps `context` and `expected`.

    An exercise with `expected`, a mathematical expression, is checked with `math-verify`; another
    one is open-ended. Other keys are left out, and a key whose value is null counts as absent.

    Args:
        train_path: a .jsonl file.
        validation_path, test_path: the same; null holds a tenth of the training ones out.
        task: name of the skill.
        name: of the set; null takes that of `train_path`.
        licence: of the texts.

    Raises:
        UserError: for a file that cannot be read, a line without an instruction or an answer, and
            an answer that is not the one that is expected; file and line are named. Also without
            the package `math-verify` where it is needed.
    """
    named: dict[Split, str | None] = {"validation": validation_path, "test": test_path}
    splits: dict[Split, list[Exercise]] = {
        s: list(_read(f"{KEY}.{s}_path", p, task)) for s, p in named.items() if p is not None
    }
    train = list(_read(f"{KEY}.train_path", train_path, task))
    parts = with_held_out_exercises(
        train,
        splits,
        source=f"{KEY}.train_path={train_path}",
        naming=f"{KEY}.{{split}}_path=<file>",
    )
    return Exercises(name=name or Path(train_path).name, licence=licence, splits=parts)


def _read(key: str, value: str, task: str) -> Iterator[Exercise]:
    path, place = Path(value).expanduser(), f"{key}={value}"
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        raise UserError(f"{place}: expected a .jsonl file, with lines such as {EXAMPLE}")
    for where, record in json_records(path, place, example=EXAMPLE):
        yield _exercise(record, where, task)


def _exercise(record: object, place: str, task: str) -> Exercise:
    if not isinstance(record, Mapping):
        raise UserError(f"{place}: the record is {kind_of(record)}; expected {EXAMPLE}")
    present = {str(key): value for key, value in record.items() if value is not None}
    for key in ("instruction", "answer"):
        if key not in present:
            raise UserError(
                f"{place}: the record has no {key!r}; it has {listed(present)}; expected "
                f"{EXAMPLE}; write it, or drop the record"
            )
    answer = filled(present["answer"], "'answer'", place)
    check = None
    if "expected" in present:
        expected = filled(present["expected"], "'expected'", place)
        gold = parsed(expected, "'expected'", place, open_ended="drop the key")
        check = partial(is_equal, gold=gold)
        if not check(answer):
            raise UserError(
                f"{place}: 'answer' does not come to 'expected', {expected}; expected it behind "
                "'Answer:' or '####', or at the end; mend one of them, or drop the record"
            )
    return Exercise(
        task=task,
        instruction=filled(present["instruction"], "'instruction'", place),
        answer=answer,
        place=place,
        context=string(present["context"], "'context'", place) if "context" in present else None,
        check=check,
    )


def parsed(expected: str, name: str, place: str, *, open_ended: str) -> list[Any]:
    """Read an expression, in LaTeX or plain, as `is_equal` takes it.

    Args:
        expected: the expression.
        name: of what says it, for messages.
        place: of its record, for messages.
        open_ended: what to do for an answer that is not checked, for messages.

    Raises:
        UserError: without math-verify, and for what it does not read.
    """
    try:
        from math_verify import parse
    except ModuleNotFoundError as error:
        raise UserError(
            f"{place}: {name} is checked with the package math-verify, which is not installed; "
            "install it with: pip install -e '.[tasks]'"
        ) from error
    # Of 42 dollars the unit is a word, and no product of seven letters.
    gold = (parse(expected) if WORD.search(expected) else []) or parse(_as_latex(expected))
    if not gold:
        raise UserError(
            f"{place}: {name} is {expected!r}, which math-verify does not read; expected a "
            "mathematical expression, such as 42 or \\frac{1}{2}; "
            f"{open_ended} for an open answer"
        )
    return gold


def is_equal(text: str, *, gold: list[Any]) -> bool:
    """Whether a text answers with an expression that is equal to `gold`."""
    from math_verify import parse, verify

    said = said_answer(text)
    # Prose is read for the number in it, an expression alone, such as x+1, as what it is.
    return any(verify(gold, parse(reading)) for reading in (said, _as_latex(said)))


def _as_latex(expression: str) -> str:
    return expression if "$" in expression else f"${expression}$"
