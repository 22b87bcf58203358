"""Emoji with their names as captions and their groups as classes.

The pictures are the bitmaps of Noto Color Emoji (Google, OFL 1.1), in Debian's package
`fonts-noto-color-emoji`; labels and groups are Unicode's, in the npm package `emojibase-data`
(M. Johnson, MIT). Left out are emoji of several characters, such as flags and families, which the
font composes; letters that only make flags, which belong to no group; and what is newer than the
font.
"""

import json
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from stillhouse.data.pictures.made_up import made_up
from stillhouse.data.pictures.pictures import Pictures, Samples, held_out, mixed
from stillhouse.data.pictures.reading import PictureReader, resized
from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError
from stillhouse.ranges import Count

NAME, LICENCE = "Noto Color Emoji", "OFL-1.1; labels MIT"
FONT_KEY, NAMES_KEY = "data.source.font_path", "data.source.names_path"
FONT, LABELS, GROUPS = "NotoColorEmoji.ttf", "en/data.json", "meta/groups.json"
SYNTHETIC_CLASSES = ("animals-nature", "food-drink", "objects", "symbols")
# Asks for the emoji's colours and adds nothing to a single character.
VARIATION_SELECTOR = "FE0F"


class Named(NamedTuple):
    """An emoji of one character.

    Attributes:
        character: its code.
        label: its name.
        group: number of its group.
    """

    character: int
    label: str
    group: int


def emoji(
    *,
    font_path: str,
    names_path: str,
    image_size: Count = 32,
    validation: Count = 100,
    test: Count = 200,
    synthetic: bool = False,
) -> Pictures:
    """Read emoji, in RGB on white; their 136 x 128 pixels are made square with white.

    Args:
        font_path: folder of the unpacked font's package.
        names_path: folder of the unpacked package of names.
        image_size: pixels a side, antialiased.
        validation, test: how many are held out for each.
        synthetic: read no file; make random pictures with captions.

    Raises:
        UserError: for a folder without font or names, for what cannot be read of them, a font that
            draws no emoji that is named, and when none is left for training.
    """
    if synthetic:
        shape = (3, image_size, image_size)
        return made_up(NAME, shape=shape, classes=SYNTHETIC_CLASSES, captioned=True)
    groups, names = _names(names_path)
    bitmaps = _bitmaps(font_path)
    drawn = [name for name in names if name.character in bitmaps]
    if not drawn:
        raise UserError(
            f"{FONT_KEY}={font_path}: the font has no bitmap of any emoji in "
            f"{NAMES_KEY}={names_path}; fetch both packages anew"
        )
    reader = PictureReader(f"{FONT_KEY}={font_path}", "rgb", image_size=None)
    values = [reader.read(BytesIO(bitmaps[n.character]), n.label) for n in drawn]
    height, width = values[0].shape[1:]
    above, left = max(width - height, 0), max(height - width, 0)
    sides = (left // 2, left - left // 2, above // 2, above - above // 2)
    samples = Samples(
        resized(F.pad(torch.stack(values), sides, value=1.0), image_size),
        torch.tensor([name.group for name in drawn]),
        tuple(name.label for name in drawn),
    )
    splits = held_out(mixed(samples), validation=validation, test=test)
    return Pictures(NAME, LICENCE, groups, splits)


def _names(names_path: str) -> tuple[tuple[str, ...], list[Named]]:
    """Return the names of the groups, and the emoji of one character that are in one."""
    names = [_json(names_path, name) for name in (GROUPS, LABELS)]
    try:
        by_number = {int(number): str(group) for number, group in names[0]["groups"].items()}
        groups = tuple(by_number[number] for number in range(len(by_number)))
        single = [e for e in names[1] if "group" in e and len(_codes(e)) == 1]
        return groups, [_named(entry, len(groups)) for entry in single]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{NAMES_KEY}={names_path}: {GROUPS} or {LABELS} is not as in emojibase-data 17.0.0: "
            f"{one_line(error)}; fetch the package anew"
        ) from error


def _named(entry: Any, num_groups: int) -> Named:
    (code,) = _codes(entry)
    named = Named(int(code, 16), str(entry["label"]), int(entry["group"]))
    if not 0 <= named.group < num_groups:
        raise ValueError(f"{named.label} is in a group of number {named.group}")
    return named


def _codes(entry: Any) -> list[str]:
    return [code for code in entry["hexcode"].split("-") if code != VARIATION_SELECTOR]


def _json(names_path: str, name: str) -> Any:
    files = sorted(Path(names_path).expanduser().rglob(name))
    if not files:
        raise UserError(
            f"{NAMES_KEY}={names_path}: no {name} is in the folder; expected the package "
            "emojibase-data 17.0.0, unpacked; the stage in conf/stage/fetch_emoji_names.yaml "
            "fetches it"
        )
    try:
        return json.loads(files[0].read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{NAMES_KEY}={names_path}, {name}: {one_line(error)}; expected JSON; fetch the "
            "package anew"
        ) from error


def _bitmaps(font_path: str) -> dict[int, bytes]:
    """Return the PNG of every character that the font draws as one."""
    # Imported late: few need it.
    from fontTools.ttLib import TTFont

    files = sorted(Path(font_path).expanduser().rglob(FONT))
    if not files:
        raise UserError(
            f"{FONT_KEY}={font_path}: no {FONT} is in the folder; expected the package "
            "fonts-noto-color-emoji, unpacked; the stage in conf/stage/fetch_emoji_font.yaml "
            "fetches it"
        )
    try:
        with TTFont(files[0]) as font:
            table: Any = font["CBDT"]
            (glyphs,) = table.strikeData
            characters: Any = font.getBestCmap()
            drawn = {code: glyphs.get(name) for code, name in characters.items()}
            return {code: bytes(glyph.imageData) for code, glyph in drawn.items() if glyph}
    except Exception as error:  # the library raises whatever a broken font makes it
        raise UserError(
            f"{FONT_KEY}={font_path}, {FONT}: the bitmaps cannot be read: {one_line(error)}; "
            "expected a font with one size of bitmaps in its table CBDT; fetch the package anew"
        ) from error
