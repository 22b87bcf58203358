"""What is wrong with pictures of the hub, told in one line."""

from pathlib import Path

import datasets
import pytest
from saved_pictures import pictures, save, table

from stillhouse.data.pictures.hub import hub
from stillhouse.errors import UserError

KEY = "data.source.id=./saved"


@pytest.fixture(autouse=True)
def folder(here: Path) -> Path:
    save()
    return here


def refusal_of(**options):
    with pytest.raises(UserError) as refusal:
        hub(**{"id": "./saved", "mode": "grey", "validation": 2, "test": 3} | options)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            {"image_key": "imag"},
            f"{KEY}, split train: there is no column 'imag'; it has 'image', 'code', 'word', "
            "'text', 'texts', 'share', 'label'; name the right one with "
            "data.source.image_key=<column>; did you mean 'image'?",
        ),
        (
            {"label_key": "labels"},
            f"{KEY}, split train: there is no column 'labels'; it has 'image', 'code', 'word', "
            "'text', 'texts', 'share', 'label'; name the right one with "
            "data.source.label_key=<column>; did you mean 'label'?",
        ),
        (
            {"caption_key": "word", "test_split": "held"},
            f"{KEY}, split held: there is no column 'word'; it has 'image', 'text', 'label'; name "
            "the right one with data.source.caption_key=<column>",
        ),
        (
            {"image_key": "text"},
            f"{KEY}, split train: the column 'text' holds no pictures; those that do: 'image'; "
            "name one with data.source.image_key=<column>",
        ),
        (
            {"label_key": "share"},
            f"{KEY}, split train: the column 'share' is float64; expected ClassLabel, whole "
            "numbers or strings, the same in every split; name another with "
            "data.source.label_key=<column>, or null for none",
        ),
        (
            {"label_key": "texts"},
            f"{KEY}, split train: the column 'texts' is List; expected ClassLabel, whole numbers "
            "or strings, the same in every split; name another with "
            "data.source.label_key=<column>, or null for none",
        ),
        (
            {"caption_key": "code"},
            f"{KEY}, split train, row 4: 'code' is a number; expected a string",
        ),
        (
            {"test_split": "tests"},
            "data.source.test_split=tests: the folder ./saved has no such split; it has train, "
            "held",
        ),
        (
            {"train_split": "train[:0]"},
            "data.source.train_split=train[:0]: the split holds no picture; name another",
        ),
        (
            {"validation": 9},
            "data.source.validation=9 and data.source.test=3: of 12 pictures none is left for "
            "training; hold fewer out, or give more pictures",
        ),
        ({"id": "saved"}, "data.source.id=saved: there is a folder of that name; name it ./saved"),
        (
            {"id": "./plain"},
            "data.source.id=./plain: the folder holds no data set: FileNotFoundError: Directory "
            "plain is neither a `Dataset` directory nor a `DatasetDict` directory.; expected what "
            "save_to_disk wrote; for a folder of files take data=image_folder "
            "data.source.folder_path=./plain",
        ),
        (
            {"id": "no/such"},
            "data.source.id=no/such: the data set cannot be loaded with train_split=train: "
            "ConnectionError: Couldn't reach 'no/such' on the Hub (OfflineModeIsEnabled); check "
            "id, split and network; without one, save it elsewhere with save_to_disk and name that "
            "folder",
        ),
    ],
    ids=lambda value: " ".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_bad_input_is_told_in_one_line(options, line):
    Path("plain").mkdir()
    assert refusal_of(**options) == line


@pytest.mark.parametrize(("label", "said"), [(-1, "-1"), (None, "null")])
def test_a_row_without_a_label(label, said):
    table(image=pictures(9), label=[*[0] * 8, label]).save_to_disk("bare")
    assert refusal_of(id="./bare", label_key="label") == (
        f"data.source.id=./bare, split train, row 8: the label is {said}, which is no class; "
        "expected a class in every row; drop the row, name another split, or set "
        "data.source.label_key=null"
    )


def test_classes_that_differ_between_splits():
    parts = {
        "train": table(image=pictures(9), label=[0] * 9),
        "test": table(image=pictures(9), label=[0] * 9, names=["dog", "cat"]),
    }
    datasets.DatasetDict(parts).save_to_disk("mixed")
    assert refusal_of(id="./mixed", label_key="label", test_split="test") == (
        "data.source.id=./mixed, split test: the column 'label' is ClassLabel of dog, cat; "
        "expected ClassLabel, whole numbers or strings, the same in every split; name another with "
        "data.source.label_key=<column>, or null for none"
    )


def test_rows_without_picture_or_caption():
    table(image=[*pictures(8), None]).save_to_disk("bare")
    assert refusal_of(id="./bare") == (
        "data.source.id=./bare, split train, row 8: there is no picture; expected one in every "
        "row; drop the row"
    )
    table(image=pictures(9), text=[*["a"] * 8, ""]).save_to_disk("silent")
    assert refusal_of(id="./silent", caption_key="text") == (
        "data.source.id=./silent, split train, row 8: 'text' is empty; expected some text; fill "
        "it or drop the record"
    )


def test_a_file_that_is_no_picture():
    broken = {"bytes": b"x", "path": None}
    table(image=[*pictures(8), broken]).save_to_disk("broken")
    assert refusal_of(id="./broken") == (
        "data.source.id=./broken, split train, row 8: the file is no picture that PIL knows; "
        "replace it or take it out"
    )


def test_pictures_of_two_sizes():
    table(image=[*pictures(8), *pictures(1, size=(5, 4))]).save_to_disk("sizes")
    assert refusal_of(id="./sizes") == (
        "data.source.image_size=null: split train, row 8 is 5 wide and 4 high, split train, row 1 "
        "6 and 4; expected one size of all pictures; set data.source.image_size=<pixels>, which "
        "crops and resizes them"
    )
    assert len(hub(id="./sizes", mode="rgb", image_size=4, validation=1, test=1).splits) == 3
