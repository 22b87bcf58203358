import json
import sys
from pathlib import Path

import pytest

from stillhouse.data.corpora.answered import answered
from stillhouse.data.tasks.answered_files import answered_files
from stillhouse.errors import UserError

EXAMPLE = '{"instruction": "…", "answer": "…"}'
KEY = "data.corpus.exercises.train_path=a.jsonl"
FINE = {"instruction": "6*7?", "answer": "It is 42.", "expected": "42"}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name, *records):
    Path(name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return name


def held():
    other = FINE | {"instruction": "And what else?"}
    return {"validation_path": write("v.jsonl", other), "test_path": write("t.jsonl", other)}


def test_records_become_exercises_and_conversations():
    talk = {"instruction": "Hi!", "answer": "Hello.", "context": "Be kind.", "id": 3}
    path = write("a.jsonl", FINE, talk | {"expected": None})
    made = answered_files(train_path=path, task="talk", licence="CC0", **held())
    first, second = made.splits["train"]
    assert (first.task, first.answer, first.context) == ("talk", "It is 42.", None)
    assert second.check is None
    assert (made.name, made.licence) == ("a.jsonl", "CC0")
    corpus = answered(exercises=made)
    assert (corpus.name, corpus.licence) == ("a.jsonl", "CC0")
    conversation = corpus.documents("train")[1]
    assert conversation.messages == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi!"},
        {"role": "assistant", "content": "Hello."},
    ]
    assert conversation.place == f"{KEY}, line 2"


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        (
            "42",
            ["42", "so 42.", "$42$", "#### 42", "1, 2\nAnswer: 84/2", "\\boxed{7}? Answer: 42"],
            ["41", "4.2", "", "no"],
        ),
        (r"\frac{1}{2}", ["0.5", "it is $\\frac{2}{4}$"], ["$\\frac{1}{3}$", "2"]),
        ("$x+1$", ["$1+x$"], ["$x-1$"]),
        ("x+1", ["x+1", "Answer: 1+x", "$1+x$"], ["x", "1"]),
        ("sqrt(2)", ["sqrt(2)", "$\\sqrt{2}$"], ["2"]),
        ("(2,3)", ["(2,3)"], ["(2,4)", "2"]),
        ("42 dollars", ["42 dollars", "That makes 42."], ["41 dollars", "42.5"]),
        ("12:30", ["12:30"], ["12", "30"]),
    ],
)
def test_an_expected_answer_is_compared_as_mathematics(expected, right, wrong):
    record = {"instruction": "?", "answer": right[0], "expected": expected}
    made = answered_files(train_path=write("a.jsonl", record), **held())
    (exercise,) = made.splits["train"]
    assert all(map(exercise.check, right))
    assert not any(map(exercise.check, wrong))


def test_what_is_not_named_is_held_out_by_content():
    records = [{"instruction": f"say {i}", "answer": str(i)} for i in range(400)]
    made = answered_files(train_path=write("a.jsonl", *records))
    parts = {s: {e.instruction for e in part} for s, part in made.splits.items()}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 400
    assert all(20 < len(parts[s]) < 60 for s in ("validation", "test"))
    test = answered_files(train_path="a.jsonl", test_path=held()["test_path"])
    assert {e.instruction for e in test.splits["validation"]} == parts["validation"]
    assert {e.instruction for e in test.splits["train"]} == parts["train"] | parts["test"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"instruction": "6*7?", "reply": "42", "answer": None},
            f"the record has no 'answer'; it has 'instruction', 'reply'; expected {EXAMPLE}; write "
            "it, or drop the record",
        ),
        (
            {"answer": "42"},
            f"the record has no 'instruction'; it has 'answer'; expected {EXAMPLE}; write it, or "
            "drop the record",
        ),
        (
            {"instruction": "6*7?", "answer": " "},
            "'answer' is empty; expected some text; fill it or drop the record",
        ),
        ({"instruction": 3, "answer": "42"}, "'instruction' is a number; expected a string"),
        (FINE | {"context": []}, "'context' is a list; expected a string"),
        (["6*7?"], f"the record is a list; expected {EXAMPLE}"),
        (FINE | {"expected": 42}, "'expected' is a number; expected a string"),
        (
            FINE | {"answer": "It is 41."},
            "'answer' does not come to 'expected', 42; expected it behind 'Answer:' or '####', or "
            "at the end; mend one of them, or drop the record",
        ),
        (
            FINE | {"expected": "$$"},
            "'expected' is '$$', which math-verify does not read; expected a mathematical "
            "expression, such as 42 or \\frac{1}{2}; drop the key for an open answer",
        ),
    ],
)
def test_a_record_that_is_no_exercise_is_named_by_file_and_line(record, words):
    write("a.jsonl", FINE, record)
    with pytest.raises(UserError) as caught:
        answered_files(train_path="a.jsonl", **held())
    assert str(caught.value) == f"{KEY}, line 2: {words}"


def test_what_is_not_json_lines_is_refused():
    Path("a.jsonl").write_text('{"instruction" 3}\n')
    with pytest.raises(UserError) as caught:
        answered_files(train_path="a.jsonl", **held())
    assert str(caught.value) == (
        f"{KEY}, line 1: not JSON: Expecting ':' delimiter at column 16; expected a record a line, "
        f"such as {EXAMPLE}"
    )
    for name in ("none.jsonl", "a.txt"):
        with pytest.raises(UserError) as caught:
            answered_files(train_path=name, **held())
        assert str(caught.value) == (
            f"data.corpus.exercises.train_path={name}: expected a .jsonl file, with lines such as "
            f"{EXAMPLE}"
        )


def test_a_split_without_exercises_is_refused():
    with pytest.raises(UserError) as caught:
        answered_files(train_path=write("a.jsonl", FINE))
    assert str(caught.value) == (
        f"{KEY}: none of its exercises falls to validation; give more, or name "
        "data.corpus.exercises.validation_path=<file>"
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    write("a.jsonl", {"instruction": "Hi!", "answer": "Hello."}, FINE)
    parts = held()
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError) as caught:
        answered_files(train_path="a.jsonl", **parts)
    assert str(caught.value) == (
        "data.corpus.exercises.validation_path=v.jsonl, line 1: 'expected' is checked with the "
        "package math-verify, which is not installed; install it with: pip install "
        "-e '.[tasks]'"
    )
