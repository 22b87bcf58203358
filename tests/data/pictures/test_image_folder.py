"""A folder of one's own pictures: classes, captions, sizes, and mistakes told in one line."""

from pathlib import Path

import pytest
import torch
from commands import TINY, run_here
from PIL import Image

from stillhouse.data.pictures.image_folder import image_folder
from stillhouse.errors import UserError

KEY = "data.source.folder_path=own"


@pytest.fixture(autouse=True)
def folder(here: Path) -> Path:
    """Three cats and four dogs, of one level of grey each."""
    for i in range(7):
        write(f"own/{'cats' if i < 3 else 'dogs'}/{i}.png", level=10 * i)
    return here


def write(path, *, level=0, size=(12, 8), captions=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level,) * 3).save(path)
    if captions is not None:
        Path(path).with_suffix(".txt").write_bytes(captions)


def write_captions():
    for file in Path("own").rglob("*.png"):
        file.with_suffix(".txt").write_text(f" the {file.parent.name},\n number {file.stem} \n")


def read(path="own", **options):
    return image_folder(folder_path=path, **{"mode": "grey", "validation": 1, "test": 2} | options)


def found(made):
    """Return number -> (class, caption) of all pictures."""
    return {
        round(float(picture.mean()) * 25.5): (
            None if part.labels is None else made.classes[part.labels[i]],
            None if part.captions is None else part.captions[i],
        )
        for part in made.splits.values()
        for i, picture in enumerate(part.values)
    }


def test_sub_folders_are_classes():
    made = read()
    assert made.classes == ("cats", "dogs")
    assert found(made) == {i: ("cats" if i < 3 else "dogs", None) for i in range(7)}
    counts = {split: len(part) for split, part in made.splits.items()}
    assert counts == {"train": 4, "validation": 1, "test": 2}
    assert (made.name, made.licence) == ("own", "unknown")
    assert read(licence="CC0").licence == "CC0"


def test_a_folder_without_sub_folders_has_no_classes():
    made = read("own/dogs")
    assert made.classes == ()
    assert found(made) == dict.fromkeys(range(3, 7), (None, None))


def test_a_class_may_have_folders_of_its_own():
    write("own/cats/young/kitten.png", level=250)
    assert found(read())[25] == ("cats", None)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPEG", "a.webp", "a.PNG"])
def test_every_kind_of_file(name):
    write(f"own/cats/{name}", level=250)
    assert found(read())[25] == ("cats", None)


@pytest.mark.parametrize("name", ["own/.hidden/a.png", "own/cats/.a.png", "own/notes/a.gif"])
def test_what_is_hidden_or_no_picture_is_left_alone(name):
    write(name)
    made = read()
    assert made.classes == ("cats", "dogs")
    assert len(found(made)) == 7


@pytest.mark.parametrize(("mode", "channels"), [("grey", 1), ("rgb", 3)])
@pytest.mark.parametrize(("image_size", "shape"), [(None, (8, 12)), (4, (4, 4)), (16, (16, 16))])
def test_mode_and_size(mode, channels, image_size, shape):
    for part in read(mode=mode, image_size=image_size).splits.values():
        assert part.values.shape[1:] == (channels, *shape)
        assert part.values.dtype == torch.float32


def test_captions_lie_beside_the_pictures():
    write_captions()
    made = read()
    expected = {i: (c, f"the {c}, number {i}") for i in range(7) for c in [["cats", "dogs"][i > 2]]}
    assert found(made) == expected
    assert all(isinstance(part.captions, tuple) for part in made.splits.values())
    assert all(part.captions is None for part in read(captions=False).splits.values())


def test_a_limit_reads_no_other_picture():
    write_captions()
    whole = read()
    few = read(max_pictures=1)
    assert {split: len(part) for split, part in few.splits.items()} == dict.fromkeys(few.splits, 1)
    for split, part in few.splits.items():
        assert torch.equal(part.values, whole.splits[split].values[:1])
        assert part.captions == whole.splits[split].captions[:1]


def refusal_of(*arguments, **options):
    with pytest.raises(UserError) as refusal:
        read(*arguments, **options)
    return str(refusal.value)


@pytest.mark.parametrize("path", ["none", "own/cats/0.png"])
def test_no_folder(path):
    line = "there is no such folder; expected a folder of pictures"
    assert refusal_of(path) == f"data.source.folder_path={path}: {line}"


def test_an_empty_folder():
    Path("empty/a").mkdir(parents=True)
    Path("empty/a/notes.txt").write_text("x")
    assert refusal_of("empty") == (
        "data.source.folder_path=empty: no picture is in the folder; expected .jpeg, .jpg, .png, "
        ".webp files, in it or in sub-folders, which are their classes"
    )


def test_pictures_beside_sub_folders():
    write("own/a.png")
    assert refusal_of() == (
        f"{KEY}: a.png lies beside the sub-folder cats; expected all pictures in sub-folders, "
        "which are their classes, or none; move one or the other"
    )


def test_sub_folders_that_are_splits():
    for split in ("val", "train"):
        write(f"splits/{split}/cats/a.png")
    assert refusal_of("splits") == (
        "data.source.folder_path=splits: its sub-folders are train, val, which are splits and no "
        "classes; expected one folder of all pictures, of which data.source.validation and "
        "data.source.test are held out; name data.source.folder_path=splits/train, or move the "
        "pictures"
    )


def test_a_file_that_is_no_picture_is_named():
    Path("own/dogs/4.png").write_text("x")
    assert refusal_of() == (
        f"{KEY}, dogs/4.png: the file is no picture that PIL knows; replace it or take it out"
    )


def test_pictures_of_two_sizes():
    write("own/dogs/5.png", level=50, size=(9, 8))
    said = refusal_of()
    assert said in {
        f"data.source.image_size=null: {a}; expected one size of all pictures; set "
        "data.source.image_size=<pixels>, which crops and resizes them"
        for i in range(7)
        for other in [f"{['cats', 'dogs'][i > 2]}/{i}.png"]
        for a in (
            f"dogs/5.png is 9 wide and 8 high, {other} 12 and 8",
            f"{other} is 12 wide and 8 high, dogs/5.png 9 and 8",
        )
    }
    assert len(found(read(image_size=8))) == 7


def test_fewer_pictures_than_are_held_out():
    assert refusal_of(validation=3, test=4) == (
        "data.source.validation=3 and data.source.test=4: of 7 pictures none is left for training; "
        "hold fewer out, or give more pictures"
    )


def test_a_picture_without_a_caption():
    write_captions()
    Path("own/dogs/5.txt").unlink()
    assert refusal_of() == (
        f"{KEY}: dogs/5.png has no caption, and 6 of 7 pictures have one; write 5.txt beside it, "
        "or read none with data.source.captions=false"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b" \n", "the caption is empty; expected some text; write it"),
        (b"caf\xe9", "the caption is not UTF-8, at byte 3; convert it"),
    ],
)
def test_a_caption_that_cannot_be_used(content, said):
    write_captions()
    Path("own/dogs/5.txt").write_bytes(content)
    way_out = "or read no captions with data.source.captions=false"
    assert refusal_of() == f"{KEY}, dogs/5.txt: {said}, {way_out}"


def test_a_byte_order_mark_is_no_caption():
    write_captions()
    Path("own/dogs/5.txt").write_bytes("\ufeffa dog".encode())
    assert found(read())[5] == ("dogs", "a dog")


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "data.source.folder_path has no value; set it with data.source.folder_path=<value>"),
        (
            ["data.source.folder_path=./none"],
            "data.source.folder_path=./none: there is no such file or folder",
        ),
        (
            ["data.source.folder_path=own", "data.source.mode=gray"],
            "data.source.mode=gray: expected grey or rgb",
        ),
    ],
)
def test_a_mistake_on_the_command_line(capfd, arguments, line):
    done = run_here(capfd, *TINY, "experiment=scm", "data=image_folder", *arguments)
    assert (done.code, done.err) == (2, f"error: {line}\n")


def test_a_folder_trains_a_generator(capfd, folder):
    for i in range(7, 14):
        write(f"own/dogs/{i}.png", level=10 * i)
    overrides = ("data.source.folder_path=own", "data.source.validation=4", "data.source.test=4")
    done = run_here(capfd, *TINY, "experiment=scm", "data=image_folder", *overrides)
    assert done.code == 0, done.err
    assert list(folder.glob("outputs/scm/*/student/model_index.json"))
