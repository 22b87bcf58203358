"""GLUE's tasks, with the columns that the hub's have, from a folder and from a hub played here."""

import datasets
import pytest
from datasets import Dataset, DatasetDict

from stillhouse.data.labelled.glue import glue
from stillhouse.data.labelled.task import Example
from stillhouse.errors import UserError

# As the hub's data set card lists them.
COLUMNS = {
    "cola": ("sentence", None, 2),
    "sst2": ("sentence", None, 2),
    "mrpc": ("sentence1", "sentence2", 2),
    "qqp": ("question1", "question2", 2),
    "stsb": ("sentence1", "sentence2", None),
    "mnli": ("premise", "hypothesis", 3),
    "qnli": ("question", "sentence", 2),
    "rte": ("sentence1", "sentence2", 2),
    "wnli": ("sentence1", "sentence2", 2),
}


def rows(task, count, words="train"):
    text, pair, classes = COLUMNS[task]
    made = []
    for i in range(count):
        row = {text: f"{words} {i}", "label": i * 0.5 if classes is None else i % classes, "idx": i}
        made.append(row if pair is None else row | {pair: f"pair {i}"})
    return Dataset.from_list(made)


@pytest.fixture
def hub(monkeypatch):
    """What is asked of the hub; every split has rows of the task's columns."""
    asked = []

    def load(id, config_name, *, revision, split):
        asked.append((id, config_name, revision, split))
        return rows(config_name, 60 if split == "train" else 4, split)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


@pytest.fixture
def saved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def save(**splits):
        DatasetDict(splits).save_to_disk("./saved")
        return "./saved"

    return save


@pytest.mark.parametrize("task", COLUMNS)
def test_every_task_is_read_by_its_own_columns(hub, task):
    made = glue(task=task, revision="abc")
    _, pair, classes = COLUMNS[task]
    test = "validation_matched" if task == "mnli" else "validation"
    assert hub == [("nyu-mll/glue", task, "abc", "train"), ("nyu-mll/glue", task, "abc", test)]
    second = Example(f"{test} 1", pair and "pair 1", 0.5 if classes is None else 1)
    assert made.splits["test"][1] == second
    assert made.task.num_labels == (classes or 1)
    assert made.task.kind == ("regression" if classes is None else "classification")
    held, trained = made.splits["validation"], made.splits["train"]
    assert held, "a tenth of the training rows"
    assert len(held) + len(trained) == 60


def test_a_saved_folder_is_one_task(saved):
    id = saved(train=rows("rte", 60), dev=rows("rte", 3))
    made = glue(task="rte", id=id, test_split="dev", max_examples=40)
    assert [len(part) for part in (*made.splits.values(),)][-1] == 3
    assert len(made.splits["train"]) + len(made.splits["validation"]) == 40


@pytest.mark.parametrize("task", ["stsb", "sst2", "mnli"])
def test_synthetic_asks_for_nothing(hub, task):
    made = glue(task=task, synthetic=True)
    assert hub == []
    assert all((e.pair is None) == (task == "sst2") for e in made.splits["train"])
    assert len({e.label for e in made.splits["train"]}) == {"stsb": 5, "sst2": 2, "mnli": 3}[task]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"task": "sts-b"},
            "data.corpus.task=sts-b: GLUE has no such task; expected one of cola, sst2, mrpc, qqp, "
            "stsb, mnli, qnli, rte, wnli; did you mean 'stsb'?",
        ),
        (
            {"task": "rte", "max_examples": 0},
            "data.corpus.max_examples=0: expected 1 or more, or null",
        ),
        (
            {"task": "mnli"},
            "data.corpus.id=./saved: split train has no column 'premise', where mnli holds its "
            "texts and labels; it has 'sentence1', 'label', 'idx', 'sentence2'",
        ),
        (
            {"task": "rte", "test_split": "test"},
            "data.corpus.id=./saved, split test, row 0: the label is hidden, as in all of GLUE's "
            "own test splits; name a split with labels",
        ),
        (
            {"task": "rte", "test_split": "strange"},
            "data.corpus.id=./saved, split strange, row 0: the label 2 is outside the 2 classes "
            "entailment, not_entailment; expected 0 to 1; mend it, or name all classes",
        ),
    ],
)
def test_what_cannot_be_read(saved, keys, message):
    one = {"sentence1": ["a"], "sentence2": ["b"]}
    hidden, strange = (Dataset.from_dict({**one, "label": [n]}) for n in (-1, 2))
    id = saved(train=rows("rte", 60), test=hidden, strange=strange)
    with pytest.raises(UserError) as refused:
        glue(**({"id": id} | keys))
    assert str(refused.value) == message
