"""Pictures of a data set of the Hugging Face hub, or of a folder that `datasets` has saved."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stillhouse.data.corpora.hub import rows_of
from stillhouse.data.corpora.records import filled, listed
from stillhouse.data.pictures.pictures import (
    Pictures,
    Samples,
    Split,
    held_out_places,
    order_of_chance,
)
from stillhouse.data.pictures.reading import Mode, PictureReader
from stillhouse.errors import UserError, did_you_mean
from stillhouse.ranges import Count

KEY = "data.source"
# Kinds of columns, but for ClassLabel, whose values are classes.
PLAIN = ("int", "string", "large_string", "bool")


class Columns(NamedTuple):
    """Where a row has its picture, and perhaps a label and a caption."""

    image: str
    label: str | None
    caption: str | None


class Part(NamedTuple):
    """What is read of a split.

    Attributes:
        name: of the split, as its data set has it.
        rows: a `datasets.Dataset` of the columns that are read.
        chosen: [M], which rows.
    """

    name: str
    rows: Any
    chosen: Tensor


def hub(
    *,
    id: str,
    mode: Mode,
    config_name: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    image_key: str = "image",
    label_key: str | None = None,
    caption_key: str | None = None,
    image_size: Count | None = None,
    validation: Count = 100,
    test: Count = 100,
    max_pictures: Count | None = None,
    licence: str = "unknown",
) -> Pictures:
    """Read a data set with `datasets`; its pictures are held in memory as float32.

    `reading.py` says what becomes of transparency, palettes and 16 bits.

    Args:
        id: of the data set on the hub, or a folder that `save_to_disk` wrote; a folder in the
            present one is named `./folder`.
        mode: grey has one channel, rgb three.
        config_name, revision: as in `datasets.load_dataset`.
        train_split: name of the training split, or a slice of it such as `train[:1000]`.
        validation_split, test_split: the same; null holds pictures out of the training ones.
        image_key: column of the pictures.
        label_key: column of the classes: `ClassLabel`, whole numbers or strings; null has none.
        caption_key: column of the captions: strings, or lists of which the first is taken; null has
            none.
        image_size: pixels a side: a square is cut out of the middle and resized, antialiased; null
            keeps the size, which then is one for all.
        validation, test: how many are held out for each split that is not named.
        max_pictures: read n pictures of each split only, drawn by chance; null reads all.
        licence: of the pictures.

    Raises:
        UserError: for a data set or split that cannot be loaded, a column that is not there or
            holds something else, a picture that cannot be read or is of another size, a row without
            its label or caption, and when none is left for training; split and row, counted from 0,
            are named.
    """
    columns = Columns(image_key, label_key, caption_key)
    version = {"config_name": config_name, "revision": revision}

    def rows(key: str, split: str) -> Any:
        folders = f"data=image_folder {KEY}.folder_path={id}"
        found = rows_of(id, key, split, version, prefix=KEY, folders=folders)
        if len(found) == 0:
            raise UserError(f"{KEY}.{key}={split}: the split holds no picture; name another")
        return _selected(found, columns, f"{KEY}.id={id}, split {split}")

    train = rows("train_split", train_split)
    names: dict[Split, str | None] = {"validation": validation_split, "test": test_split}
    places = held_out_places(
        len(train),
        validation=validation if validation_split is None else 0,
        test=test if test_split is None else 0,
        most=max_pictures,
    )
    parts: dict[Split, Part] = {
        split: Part(train_split, train, chosen) for split, chosen in places.items()
    }
    for split, name in names.items():
        if name is not None:
            own = rows(f"{split}_split", name)
            parts[split] = Part(name, own, order_of_chance(len(own))[:max_pictures])
    classes, numbers = _classes(list(parts.values()), label_key, f"{KEY}.id={id}")
    reader = PictureReader(f"{KEY}.id={id}", mode, image_size)
    splits: dict[Split, Samples] = {
        split: _samples(part, columns, numbers, reader) for split, part in parts.items()
    }
    return Pictures(id, licence, classes, splits)


def _selected(rows: Any, columns: Columns, place: str) -> Any:
    """Return the columns that are read, pictures as their files."""
    from datasets import Image

    for key, column in columns._asdict().items():
        if column is not None and column not in rows.column_names:
            raise UserError(
                f"{place}: there is no column {column!r}; it has {listed(rows.column_names)}; name "
                f"the right one with {KEY}.{key}_key=<column>"
                f"{did_you_mean(column, rows.column_names)}"
            )
    if not isinstance(rows.features[columns.image], Image):
        found = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
        raise UserError(
            f"{place}: the column {columns.image!r} holds no pictures; those that do: "
            f"{', '.join(map(repr, found)) or 'none'}; name one with {KEY}.image_key=<column>"
        )
    rows = rows.select_columns([column for column in columns if column is not None])
    return rows.cast_column(columns.image, Image(decode=False))


def _classes(
    parts: Sequence[Part], key: str | None, place: str
) -> tuple[tuple[str, ...], Mapping[object, int]]:
    """Return the classes' names, and the number of each value of a label column."""
    from datasets import ClassLabel

    if key is None:
        return (), {}
    kinds = {part.name: part.rows.features[key] for part in parts}
    first = next(iter(kinds.values()))
    for name, kind in kinds.items():
        if isinstance(kind, ClassLabel) and getattr(first, "names", None) == kind.names:
            continue
        plain = str(getattr(kind, "dtype", "")).lstrip("u").startswith(PLAIN)
        if not plain or isinstance(kind, ClassLabel) or kind != first:
            raise UserError(
                f"{place}, split {name}: the column {key!r} is {_said(kind)}; expected ClassLabel, "
                "whole numbers or strings, the same in every split; name another with "
                f"{KEY}.label_key=<column>, or null for none"
            )
    if isinstance(first, ClassLabel):
        return tuple(first.names), {number: number for number in range(len(first.names))}
    values = {value for part in parts for value in part.rows.unique(key)} - {None}
    return tuple(map(str, sorted(values))), {v: i for i, v in enumerate(sorted(values))}


def _said(kind: Any) -> str:
    dtype = getattr(kind, "dtype", type(kind).__name__)
    names = getattr(kind, "names", None)
    return f"ClassLabel of {', '.join(names)}" if names else str(dtype)


def _samples(
    part: Part, columns: Columns, numbers: Mapping[object, int], reader: PictureReader
) -> Samples:
    """Read the chosen rows of a split."""
    values: list[Tensor] = []
    labels: list[int] = []
    captions: list[str] = []
    for number, row in zip(part.chosen.tolist(), part.rows.select(part.chosen), strict=True):
        name = f"split {part.name}, row {number}"
        place = f"{reader.origin}, {name}"
        values.append(reader.read(_file(row[columns.image], place), name))
        if columns.label is not None:
            labels.append(_label(row[columns.label], numbers, place))
        if columns.caption is not None:
            said = row[columns.caption]
            first = said[0] if isinstance(said, list) and said else said
            captions.append(" ".join(filled(first, repr(columns.caption), place).split()))
    return Samples(
        torch.stack(values),
        None if columns.label is None else torch.tensor(labels),
        None if columns.caption is None else tuple(captions),
    )


def _file(value: Any, place: str) -> Path | BytesIO:
    if value is None:
        raise UserError(f"{place}: there is no picture; expected one in every row; drop the row")
    return Path(value["path"]) if value["bytes"] is None else BytesIO(value["bytes"])


def _label(value: Any, numbers: Mapping[object, int], place: str) -> int:
    if value not in numbers:
        raise UserError(
            f"{place}: the label is {'null' if value is None else value}, which is no class; "
            "expected a class in every row; drop the row, name another split, or set "
            f"{KEY}.label_key=null"
        )
    return numbers[value]
