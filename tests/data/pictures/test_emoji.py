"""Emoji out of a font and a list of names as the packages have them, made here."""

import json

import pytest
import torch
from emoji_font import write_font

from stillhouse.data.pictures.emoji import emoji
from stillhouse.errors import UserError

SMILES = {0x1F600 + i: (10 * i, 0, 0, 255) for i in range(20)}
# A heart whose colour is asked for, a clear square, and a letter that makes flags.
OTHERS = {0x2764: (0, 0, 255, 255), 0x25FB: (0, 0, 0, 0), 0x1F1E6: (0, 255, 0, 255)}
FONT, NAMES = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf", "package/en/data.json"


def entry(hexcode, label, **more):
    return {"label": label, "hexcode": hexcode, "tags": ["x"], **more}


ENTRIES = [
    *(entry(f"{code:X}", f"smile {code - 0x1F600}", group=0) for code in SMILES),
    entry("2764-FE0F", "red heart", group=2),
    entry("25FB-FE0F", "clear square", group=2),
    entry("1F1E6", "regional indicator A"),
    entry("1F1E6-1F1E6", "a flag", group=2),
    entry("1F6D8", "newer than the font", group=2),
]


@pytest.fixture
def packages(tmp_path):
    write_font(tmp_path / "font" / FONT, SMILES | OTHERS)
    (tmp_path / "names/package/en").mkdir(parents=True)
    (tmp_path / "names/package/meta").mkdir()
    write_names(tmp_path, ENTRIES)
    groups = {"1": "people", "0": "smileys", "2": "symbols"}
    write_groups(tmp_path, {"groups": groups, "hierarchy": {}})
    return tmp_path


def write_names(packages, content):
    (packages / "names" / NAMES).write_text(json.dumps(content))


def write_groups(packages, content):
    (packages / "names/package/meta/groups.json").write_text(json.dumps(content))


def read(packages, **options):
    return emoji(
        font_path=str(packages / "font"),
        names_path=str(packages / "names"),
        **{"validation": 4, "test": 5} | options,
    )


def by_caption(made):
    return {
        caption: (picture, made.classes[label])
        for part in made.splits.values()
        for caption, picture, label in zip(part.captions, part.values, part.labels, strict=True)
    }


def test_captions_and_classes_are_those_of_the_pictures(packages):
    made = read(packages)
    assert made.classes == ("smileys", "people", "symbols")
    found = by_caption(made)
    assert set(found) == {*(f"smile {i}" for i in range(20)), "red heart", "clear square"}
    for i in range(20):
        picture, group = found[f"smile {i}"]
        assert picture.shape == (3, 32, 32)
        assert picture[:, 16, 16].tolist() == pytest.approx([10 * i / 255, 0, 0])
        assert group == "smileys"
    heart, group = found["red heart"]
    assert heart[:, 16, 16].tolist() == [0, 0, 1]
    assert group == "symbols"
    assert {split: len(part) for split, part in made.splits.items()} == {
        "train": 13,
        "validation": 4,
        "test": 5,
    }
    assert made.licence == "OFL-1.1; labels MIT"


def test_what_is_transparent_is_white(packages):
    clear, _ = by_caption(read(packages))["clear square"]
    torch.testing.assert_close(clear, torch.ones(3, 32, 32))


@pytest.mark.parametrize("size", [(136, 128), (128, 136)])
def test_bitmaps_are_made_square_with_white(packages, size):
    """And not cut or stretched: four of 136 rows are white on either side."""
    write_font(packages / "font" / FONT, SMILES | OTHERS, size=size)
    heart, _ = by_caption(read(packages, image_size=136))["red heart"]
    heart = heart if size[0] == 136 else heart.mT
    white = heart[0].eq(1).all(dim=1)
    assert white.nonzero().flatten().tolist() == [0, 1, 2, 3, 132, 133, 134, 135]
    assert torch.equal(heart[2], torch.ones(136, 136))


def test_synthetic_reads_nothing_and_has_captions():
    made = emoji(font_path="/no", names_path="/no", image_size=8, synthetic=True)
    for part in made.splits.values():
        assert part.values.shape[1:] == (3, 8, 8)
        assert len(part.captions) == len(part.labels) == len(part)
        for caption, label in zip(part.captions, part.labels, strict=True):
            assert caption.startswith(made.classes[label])


def refusal_of(packages, **options):
    with pytest.raises(UserError) as refusal:
        read(packages, **options)
    return str(refusal.value)


def test_a_folder_without_the_font(packages):
    (packages / "font" / FONT).unlink()
    assert refusal_of(packages) == (
        f"data.source.font_path={packages}/font: no NotoColorEmoji.ttf is in the folder; expected "
        "the package fonts-noto-color-emoji, unpacked; the stage in "
        "conf/stage/fetch_emoji_font.yaml fetches it"
    )


@pytest.mark.parametrize("name", ["en/data.json", "meta/groups.json"])
def test_a_folder_without_the_names(packages, name):
    (packages / "names/package" / name).unlink()
    assert refusal_of(packages) == (
        f"data.source.names_path={packages}/names: no {name} is in the folder; expected the "
        "package emojibase-data 17.0.0, unpacked; the stage in conf/stage/fetch_emoji_names.yaml "
        "fetches it"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no font", "TTLibError: Not a TrueType or OpenType font (not enough data)"),
        (b"\0\1\0\0" + b"\0" * 8, "KeyError: 'CBDT'"),
    ],
)
def test_a_file_that_is_no_such_font(packages, content, said):
    (packages / "font" / FONT).write_bytes(content)
    assert refusal_of(packages) == (
        f"data.source.font_path={packages}/font, NotoColorEmoji.ttf: the bitmaps cannot be read: "
        f"{said}; expected a font with one size of bitmaps in its table CBDT; fetch the package "
        "anew"
    )


def test_names_that_are_not_json(packages):
    (packages / "names" / NAMES).write_text("{")
    assert refusal_of(packages) == (
        f"data.source.names_path={packages}/names, en/data.json: JSONDecodeError: Expecting "
        "property name enclosed in double quotes: line 1 column 2 (char 1); expected JSON; fetch "
        "the package anew"
    )


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([{"label": "x", "group": 0}], "KeyError: 'hexcode'"),
        ([{"hexcode": "1F600", "group": 0}], "KeyError: 'label'"),
        ([entry("x", "y", group=0)], "ValueError: invalid literal for int() with base 16: 'x'"),
        ([entry("1F600", "y", group=3)], "ValueError: y is in a group of number 3"),
        (3, "TypeError: 'int' object is not iterable"),
    ],
)
def test_names_of_another_kind(packages, content, said):
    write_names(packages, content)
    assert refusal_of(packages) == (
        f"data.source.names_path={packages}/names: meta/groups.json or en/data.json is not as in "
        f"emojibase-data 17.0.0: {said}; fetch the package anew"
    )


def test_groups_of_another_kind(packages):
    write_groups(packages, {"groups": ["smileys"]})
    assert refusal_of(packages) == (
        f"data.source.names_path={packages}/names: meta/groups.json or en/data.json is not as in "
        "emojibase-data 17.0.0: AttributeError: 'list' object has no attribute 'items'; fetch the "
        "package anew"
    )


def test_a_font_that_draws_none_of_the_names(packages):
    write_names(packages, [entry("1F6D8", "newer", group=0)])
    assert refusal_of(packages) == (
        f"data.source.font_path={packages}/font: the font has no bitmap of any emoji in "
        f"data.source.names_path={packages}/names; fetch both packages anew"
    )


def test_nothing_left_for_training(packages):
    assert refusal_of(packages, test=18) == (
        "data.source.validation=4 and data.source.test=18: of 22 pictures none is left for "
        "training; hold fewer out, or give more pictures"
    )
