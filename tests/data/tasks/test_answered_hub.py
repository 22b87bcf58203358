"""Exercises of a data set that `datasets` saved, with the columns of GSM8K and of Alpaca."""

from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from stillhouse.data.tasks.answered_hub import answered_hub
from stillhouse.errors import UserError

ID = "./saved"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def save(**splits: list[dict[str, Any]]) -> None:
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(ID)


def sums(count: int) -> list[dict[str, str]]:
    return [{"question": f"{n}+1?", "answer": f"{n}+1={n + 1}\n#### {n + 1}"} for n in range(count)]


def gsm(**changes: Any) -> Any:
    settings = {"id": ID, "instruction_key": "question", "checked": True, "test_split": "test"}
    return answered_hub(**(settings | changes))


def test_answers_are_checked_against_what_the_worked_one_says():
    save(train=sums(40), test=sums(2))
    made = gsm(task="gsm8k", licence="MIT")
    assert (made.name, made.licence) == (ID, "MIT")
    assert [e.instruction for e in made.splits["test"]] == ["0+1?", "1+1?"]
    exercise = made.splits["test"][1]
    assert (exercise.task, exercise.answer) == ("gsm8k", "1+1=2\n#### 2")
    assert exercise.check is not None
    assert exercise.check("one and one: 2")
    assert not exercise.check("1+1=2\n#### 3")
    held, trained = made.splits["validation"], made.splits["train"]
    assert held, "a tenth of the training ones"
    assert len(held) + len(trained) == 38
    assert not {e.instruction for e in held} & {e.instruction for e in trained}


def test_open_answers_with_a_context_and_what_they_are_about():
    rows = [
        {
            "instruction": f"say {n}",
            "about": "" if n % 3 else "sheep",
            "system": "be kind" if n % 2 else "",
            "output": f"ok {n}",
        }
        for n in range(9)
    ]
    save(train=rows[:6], validation=rows[6:], test=rows[6:])
    made = answered_hub(
        id=ID,
        validation_split="validation",
        test_split="test",
        input_key="about",
        context_key="system",
        answer_key="output",
        max_exercises=3,
    )
    assert [len(part) for part in made.splits.values()] == [3, 3, 3]
    first, second, _ = made.splits["train"]
    assert (first.context, first.instruction) == (None, "say 0\n\nsheep")
    assert (second.context, second.instruction) == ("be kind", "say 1")
    assert first.check is None


def test_what_a_given_split_asks_is_not_trained_on():
    rows = [{"instruction": f"say {n}", "answer": f"ok {n}"} for n in range(40)]
    save(train=rows, test=rows[:30])
    splits = answered_hub(id=ID, test_split="test").splits
    trained = {e.instruction for e in [*splits["train"], *splits["validation"]]}
    assert trained == {f"say {n}" for n in range(30, 40)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"instruction_key": "problem"},
            "data.corpus.exercises.instruction_key=problem: the data set ./saved has no such "
            "column; it has 'question', 'answer'",
        ),
        (
            {"max_exercises": 0},
            "data.corpus.exercises.max_exercises=0: expected 1 or more, or null",
        ),
        (
            {"test_split": "tests"},
            "data.corpus.exercises.test_split=tests: the folder ./saved has no such split; it has "
            "train, test; did you mean 'test'?",
        ),
        (
            {"max_exercises": 1},
            "data.corpus.exercises.train_split=train: none of its exercises falls to validation; "
            "give more, or name data.corpus.exercises.validation_split=<split>",
        ),
    ],
)
def test_settings_that_cannot_be(changes, message):
    save(train=sums(21)[1:], test=sums(1))
    with pytest.raises(UserError) as refused:
        gsm(**changes)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"question": "1?", "answer": " "},
            "'answer' is empty; expected some text; fill it or drop the record",
        ),
        (
            {"question": "1?", "answer": "#### $$"},
            "what 'answer' says behind its last '####' or 'Answer:' is '$$', which math-verify "
            "does not read; expected a mathematical expression, such as 42 or \\frac{1}{2}; set "
            "data.corpus.exercises.checked=false for an open answer",
        ),
    ],
)
def test_an_answer_that_cannot_be_learnt_or_checked(row, message):
    save(train=[*sums(1), row], test=sums(1))
    with pytest.raises(UserError) as refused:
        gsm()
    assert str(refused.value) == f"data.corpus.exercises.id=./saved, split train, row 1: {message}"
