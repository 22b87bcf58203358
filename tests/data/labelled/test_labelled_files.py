import json
from pathlib import Path

import pytest

from stillhouse.data.labelled.files import labelled_files
from stillhouse.data.labelled.task import Example, Task
from stillhouse.errors import UserError

EXAMPLE = '{"text": "…", "label": …}'
KEY = "data.corpus.train_path=a.jsonl"
FINE = {"text": "fine", "label": "good"}
NAMES = ["bad", "good"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(name, *records):
    Path(name).write_text("".join(json.dumps(r) + "\n" for r in records))
    return name


def read(*records, **changes):
    """Return what is read of one's own training lines; the other parts are of no matter."""
    keys = {"names": NAMES, "train_path": write("a.jsonl", *records)} | changes
    label = "good" if keys.get("kind", "classification") == "classification" else keys.pop("fine")
    held = {"validation_path": "v.jsonl", "test_path": "t.jsonl"}
    for path in held.values():
        write(path, FINE | {"label": label})
    return labelled_files(**(held | keys))


def test_texts_pairs_and_classes_by_index_and_name():
    pair = {"text": "a", "pair": "b", "label": 0, "id": 7}
    made = read(FINE, pair, {"text": "c", "pair": None, "label": 1}, licence="CC0")
    assert made.splits["train"] == [
        Example("fine", None, 1),
        Example("a", "b", 0),
        Example("c", None, 1),
    ]
    assert (made.name, made.licence) == ("a.jsonl", "CC0")
    assert made.task == Task("classification", ("bad", "good"))
    assert made.splits["test"] == [Example("fine", None, 1)]


@pytest.mark.parametrize(
    ("kind", "names", "label", "read_as"),
    [("regression", ["score"], 2, 2.0), ("multi_label", NAMES, ["good", 0], (0, 1))],
)
def test_numbers_and_several_labels(kind, names, label, read_as):
    made = read({"text": "a", "label": label}, kind=kind, names=names, fine=label)
    assert made.splits["train"] == [Example("a", None, read_as)]
    assert made.task == Task(kind, tuple(names))


def test_names_may_be_numbers():
    path = write("a.jsonl", {"text": "a", "label": 2})
    made = labelled_files(train_path=path, validation_path=path, test_path=path, names=[1, 2, 3])
    assert made.task.names == ("1", "2", "3")


def test_what_is_not_named_is_held_out_by_content():
    records = [{"text": f"text {i}", "label": i % 2} for i in range(200)]
    made = labelled_files(train_path=write("a.jsonl", *records), names=NAMES)
    texts = {split: {e.text for e in part} for split, part in made.splits.items()}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 200
    assert all(texts.values())


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {"text": "fine", "labels": 1},
            f"the record has no 'label'; it has 'text', 'labels'; expected {EXAMPLE}; write it, or "
            "drop the record; text without labels is read with stillhouse.data.corpora.files.files",
        ),
        (
            {"text": None, "label": 1},
            f"the record has no 'text'; it has 'label'; expected {EXAMPLE}; write it, or drop the "
            "record; text without labels is read with stillhouse.data.corpora.files.files",
        ),
        (
            {"text": "fine", "label": 2},
            "the label 2 is outside the 2 classes bad, good; expected 0 to 1; mend it, or name all "
            "classes",
        ),
        (
            {"text": "fine", "label": "goood"},
            "the label 'goood' is no class; expected one of bad, good; did you mean 'good'?",
        ),
        (
            {"text": " ", "label": 1},
            "'text' is empty; expected some text; fill it or drop the record",
        ),
        (FINE | {"pair": 3}, "'pair' is a number; expected a string"),
        (["fine", 1], f"the record is a list; expected {EXAMPLE}"),
    ],
)
def test_a_record_that_is_no_example_is_named_by_file_and_line(record, words):
    with pytest.raises(UserError) as refused:
        read(FINE, record)
    assert str(refused.value) == f"{KEY}, line 2: {words}"


def test_files_that_hold_no_examples():
    for name in ("none.jsonl", "a.txt"):
        with pytest.raises(UserError) as refused:
            labelled_files(train_path=name, names=NAMES)
        assert str(refused.value) == (
            f"data.corpus.train_path={name}: expected a .jsonl file, with lines such as {EXAMPLE}"
        )
    with pytest.raises(UserError) as refused:
        read()
    assert str(refused.value) == (
        f"{KEY}: the file holds no example; expected lines such as {EXAMPLE}"
    )
    with pytest.raises(UserError) as refused:
        read(FINE, test_path=None, validation_path=None)
    assert str(refused.value) == (
        f"{KEY}: none of its examples falls to validation; give more, or name "
        "data.corpus.validation_path=<file>"
    )


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"kind": "ranking"},
            "kind=ranking: expected one of classification, regression, multi_label",
        ),
        (
            {"names": ["good"]},
            "names=[good]: expected the names of 2 classes or more, all different, for "
            "data.corpus.kind=classification",
        ),
        (
            {"names": ["good", "good"]},
            "names=[good,good]: expected the names of 2 classes or more, all different, for "
            "data.corpus.kind=classification",
        ),
        (
            {"kind": "regression"},
            "names=[bad,good]: expected the names of one target, all different, for "
            "data.corpus.kind=regression",
        ),
    ],
)
def test_a_task_that_cannot_be(keys, words):
    with pytest.raises(UserError) as refused:
        labelled_files(**({"train_path": "a.jsonl", "names": NAMES} | keys))
    assert str(refused.value) == f"data.corpus.{words}"
