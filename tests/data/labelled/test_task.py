import pytest

from stillhouse.data.labelled.few_labels import few_labels
from stillhouse.data.labelled.task import Example, Task, held_out_by_content
from stillhouse.errors import UserError

CLASSES = Task("classification", ("bad", "fair", "good"))
SEVERAL = Task("multi_label", ("bad", "fair", "good"))
NUMBER = Task("regression", ("score",))
KEY = "data.train_labels"


@pytest.mark.parametrize(
    ("task", "value", "label"),
    [
        (CLASSES, 0, 0),
        (CLASSES, 2, 2),
        (CLASSES, "fair", 1),
        (NUMBER, 3, 3.0),
        (NUMBER, -1.5, -1.5),
        (SEVERAL, ["good", 0, "bad"], (0, 2)),
        (SEVERAL, [], ()),
    ],
)
def test_a_label_is_read_by_index_or_name(task, value, label):
    read = task.label(value, "a.jsonl, line 1")
    assert (read, type(read)) == (label, type(label))


@pytest.mark.parametrize(
    ("task", "value", "words"),
    [
        (
            CLASSES,
            3,
            "the label 3 is outside the 3 classes bad, fair, good; expected 0 to 2; mend it, or "
            "name all classes",
        ),
        (
            CLASSES,
            -1,
            "the label -1 is outside the 3 classes bad, fair, good; expected 0 to 2; mend it, or "
            "name all classes",
        ),
        (
            CLASSES,
            "god",
            "the label 'god' is no class; expected one of bad, fair, good; did you mean 'good'?",
        ),
        (CLASSES, 1.0, "the label is a number; expected a class, by index or by name"),
        (CLASSES, True, "the label is a boolean; expected a class, by index or by name"),
        (SEVERAL, "bad", "the label is a string; expected a list of classes, which may be empty"),
        (
            SEVERAL,
            [0, 7],
            "the label 7 is outside the 3 classes bad, fair, good; expected 0 to 2; mend it, or "
            "name all classes",
        ),
        (NUMBER, "3", "the label is a string; expected a number"),
        (NUMBER, False, "the label is a boolean; expected a number"),
        (NUMBER, float("nan"), "the label is nan; expected a finite number"),
    ],
)
def test_a_label_that_the_task_does_not_have(task, value, words):
    with pytest.raises(UserError) as refused:
        task.label(value, "a.jsonl, line 1")
    assert str(refused.value) == f"a.jsonl, line 1: {words}"


def many(count, classes=3):
    """Return examples of which class 0 has half, the others what is left."""
    return [Example(f"text {i}", None, i % 2 * (1 + i // 2 % (classes - 1))) for i in range(count)]


def test_splits_are_disjoint_by_content_and_a_text_alone_decides_its_own():
    examples = many(400)
    twice = [*examples, *(Example(e.text, None, 0) for e in examples)]
    splits = held_out_by_content(twice, {}, source="here")
    texts = {split: {e.text for e in part} for split, part in splits.items()}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 400
    assert all(20 < len(texts[split]) < 60 for split in ("validation", "test"))
    fewer = held_out_by_content(examples[:200], {"test": []}, source="here")
    assert {e.text for e in fewer["validation"]} < texts["validation"]
    assert fewer["test"] == []


def test_both_texts_of_a_pair_decide():
    pairs = [Example("one question", f"answer {i}", 0) for i in range(100)]
    assert all(held_out_by_content(pairs, {}, source="here").values())


def test_a_split_that_is_left_empty():
    with pytest.raises(UserError) as refused:
        held_out_by_content(many(1), {}, source="key=value", way_out="name {split}")
    assert (
        str(refused.value) == "key=value: none of its examples falls to validation; name validation"
    )


def chosen(examples, count, task=CLASSES, seed=0):
    return few_labels(examples, task, count=count, seed=seed, key=KEY)


def test_subsets_are_nested_balanced_and_of_the_seed():
    examples = many(400)
    all_of_them = chosen(examples, None)
    assert sorted(e.text for e in all_of_them) == sorted(e.text for e in examples)
    for count in (3, 50, 200):
        subset = chosen(examples, count)
        assert subset == all_of_them[:count]
        sizes = [sum(e.label == label for e in subset) for label in range(3)]
        assert sum(sizes) == count
        assert max(sizes) - min(sizes) <= 1
    assert chosen(examples, 50, seed=1) != chosen(examples, 50)
    assert chosen(examples[::-1], 50) == chosen(examples, 50), "the order of the file decides"


def test_a_class_that_is_used_up_leaves_its_turns_to_the_others():
    examples = [Example("rare", None, 2), *(Example(f"often {i}", None, i % 2) for i in range(20))]
    subset = chosen(examples, 11)
    assert sorted(str(e.label) for e in subset) == [*"00000", *"11111", "2"]


def test_numbers_have_no_classes_to_take_turns():
    examples = [Example(f"text {i}", None, float(i > 90)) for i in range(100)]
    subset = chosen(examples, 50, NUMBER)
    assert sum(e.label == 1.0 for e in subset) < 15


@pytest.mark.parametrize("count", [0, 2, 401])
def test_a_count_that_cannot_be(count):
    with pytest.raises(UserError) as refused:
        chosen(many(400), count)
    assert str(refused.value) == (
        f"{KEY}={count}: expected 3 to 400, an example of every class at least and the training "
        "part at most, or null for all of it"
    )
