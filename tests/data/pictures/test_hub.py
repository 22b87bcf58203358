"""Pictures of the hub, here of folders that `datasets` saved and of a hub that is played."""

from pathlib import Path

import datasets
import pytest
import torch
from commands import TINY, run_here
from saved_pictures import pictures, save, table

from stillhouse.data.pictures.hub import hub


@pytest.fixture(autouse=True)
def folder(here: Path) -> Path:
    save()
    return here


def read(**options):
    return hub(**{"id": "./saved", "mode": "grey", "validation": 2, "test": 3} | options)


def found(made, splits=("train", "validation", "test")):
    """Return number -> (class, caption) of all pictures."""
    return {
        round(float(picture.mean()) * 25.5): (
            None if part.labels is None else made.classes[part.labels[i]],
            None if part.captions is None else part.captions[i],
        )
        for part in (made.splits[split] for split in splits)
        for i, picture in enumerate(part.values)
    }


def sizes(made):
    return {split: len(part) for split, part in made.splits.items()}


@pytest.mark.parametrize("id", ["./saved", "./rows"])
def test_pictures_alone(id):
    made = read(id=id, licence="CC0")
    assert found(made) == dict.fromkeys(range(12), (None, None))
    assert sizes(made) == {"train": 7, "validation": 2, "test": 3}
    assert (made.name, made.licence, made.classes) == (id, "CC0", ())


@pytest.mark.parametrize(
    ("label_key", "classes", "said"),
    [
        ("label", ("cat", "dog", "bird"), ("cat", "dog", "bird")),
        ("code", ("10", "20", "30"), ("30", "20", "10")),
        ("word", ("bird", "cat", "dog"), ("cat", "dog", "bird")),
    ],
)
def test_labels_of_every_kind(label_key, classes, said):
    made = read(label_key=label_key)
    assert made.classes == classes
    assert found(made) == {i: (said[i % 3], None) for i in range(12)}


def test_captions_and_the_first_of_several():
    assert found(read(caption_key="text")) == {i: (None, f"picture {i}") for i in range(12)}
    assert found(read(caption_key="texts")) == {i: (None, f"first {i}") for i in range(12)}


def test_named_splits_are_read_whole_and_the_others_held_out():
    made = read(test_split="held", label_key="label")
    assert sizes(made) == {"train": 10, "validation": 2, "test": 3}
    assert set(found(made, ["train", "validation"])) == set(range(12))
    expected = {20: ("bird", None), 21: ("dog", None), 22: ("cat", None)}
    assert found(made, ["test"]) == expected
    both = read(test_split="held", validation_split="train[:3]", train_split="train[3:]")
    assert sizes(both) == {"train": 9, "validation": 3, "test": 3}
    assert set(found(both, ["train"])) == set(range(3, 12))
    assert set(found(both, ["validation"])) == set(range(3))


def test_a_limit_for_every_split():
    whole, few = read(test_split="held"), read(test_split="held", max_pictures=2)
    assert sizes(few) == {"train": 2, "validation": 2, "test": 2}
    for split, part in few.splits.items():
        assert torch.equal(part.values, whole.splits[split].values[:2])


@pytest.mark.parametrize(("mode", "channels"), [("grey", 1), ("rgb", 3)])
@pytest.mark.parametrize(("image_size", "shape"), [(None, (4, 6)), (3, (3, 3))])
def test_mode_and_size(mode, channels, image_size, shape):
    for part in read(mode=mode, image_size=image_size).splits.values():
        assert part.values.shape[1:] == (channels, *shape)


def test_the_hub_is_asked_for_what_the_config_names(monkeypatch):
    asked = []

    def load(*arguments, **keywords):
        asked.append((arguments, keywords))
        return table(img=pictures(9)).cast_column("img", datasets.Image())

    monkeypatch.setattr(datasets, "load_dataset", load)
    made = read(
        id="some/set",
        config_name="small",
        revision="abc",
        train_split="train[:9]",
        validation_split="dev",
        image_key="img",
    )
    assert sorted(asked, key=lambda call: call[1]["split"]) == [
        (("some/set", "small"), {"revision": "abc", "split": "dev"}),
        (("some/set", "small"), {"revision": "abc", "split": "train[:9]"}),
    ]
    assert sizes(made) == {"train": 6, "validation": 9, "test": 3}


def test_a_saved_folder_trains_a_generator(capfd, folder: Path):
    overrides = ("data.source.id=./rows", "data.source.label_key=label")
    held_out = ("data.source.validation=4", "data.source.test=4")
    done = run_here(capfd, *TINY, "experiment=scm", "data=hub_pictures", *overrides, *held_out)
    assert done.code == 0, done.err
    assert list(folder.glob("outputs/scm/*/student/model_index.json"))
