"""A data set of the Hugging Face hub as a corpus, or one that `datasets` has saved in a folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stillhouse.data.corpora.corpus import Corpus, Split
from stillhouse.data.corpora.held_out import with_held_out
from stillhouse.data.corpora.records import RecordKeys
from stillhouse.data.documents import Document
from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError, did_you_mean
from stillhouse.ranges import Count


def hub(
    *,
    id: str,
    config_name: str | None = None,
    revision: str | None = None,
    train_split: str = "train",
    validation_split: str | None = None,
    test_split: str | None = None,
    text_key: str = "text",
    messages_key: str = "messages",
    held_out: float = 0.05,
    max_documents: Count | None = None,
    licence: str = "unknown",
) -> Corpus:
    """Read a data set with `datasets`; `RecordKeys` says what a record is.

    Args:
        id: of the data set on the hub, or a folder that `save_to_disk` wrote; a folder in the
            present one is named `./folder`.
        config_name, revision: as in `datasets.load_dataset`.
        train_split: name of the training split; on the hub also a slice such as `train[:1%]`.
        validation_split, test_split: the same; null holds documents out of the training ones.
        text_key, messages_key: where a record holds a text or a conversation.
        held_out: share of the training documents for each split that is not named.
        max_documents: read the first n documents of each split only; null reads all.
        licence: of the texts.

    Raises:
        UserError: for a data set or split that cannot be loaded, and a record that is no document;
            split and row, counted from 0, are named.
    """
    if max_documents is not None and max_documents < 1:
        raise UserError(f"data.corpus.max_documents={max_documents}: expected 1 or more, or null")
    keys = RecordKeys(text_key, messages_key)
    version = {"config_name": config_name, "revision": revision}

    def documents(key: str, split: str) -> list[Document]:
        rows = rows_of(id, key, split, version, prefix="data.corpus")
        rows = rows.select_columns(keys.columns(rows.column_names))
        rows = rows.select(range(min(len(rows), max_documents or len(rows))))
        if len(rows) == 0:
            raise UserError(f"data.corpus.{key}={split}: the split holds no document; name another")
        place = f"data.corpus.id={id}, split {split}, row"
        return [keys.document(record, f"{place} {i}") for i, record in enumerate(rows)]

    named: dict[Split, str | None] = {"validation": validation_split, "test": test_split}
    return Corpus(
        name=id,
        licence=licence,
        splits=with_held_out(
            documents("train_split", train_split),
            {s: documents(f"{s}_split", n) for s, n in named.items() if n is not None},
            held_out=held_out,
            naming="data.corpus.{split}_split=<split>",
        ),
    )


def rows_of(
    id: str,
    key: str,
    split: str,
    version: Mapping[str, str | None],
    *,
    prefix: str,
    folders: str | None = None,
) -> Any:
    """Return a split as a `datasets.Dataset`, from a folder or from the hub.

    Args:
        id: as in `hub`.
        key: under which the split is named in the config.
        split: its name.
        version: `config_name` and `revision`.
        prefix: where `id` and `key` stand in the config, for messages.
        folders: the overrides that read a folder of files instead; by default those for texts.

    Raises:
        UserError: for a data set or split that cannot be loaded.
    """
    from datasets import load_dataset

    folder = Path(id).expanduser()
    if folder.is_dir():
        files = folders or f"data=files data.corpus.train_path={id}"
        return _rows_of_folder(id, folder, key, split, version, prefix, files)
    try:
        return load_dataset(id, version["config_name"], revision=version["revision"], split=split)
    except Exception as error:  # the library raises whatever hub, network and files make it
        raise UserError(
            f"{prefix}.id={id}: the data set cannot be loaded with {key}={split}: "
            f"{one_line(error)}; check id, split and network; without one, save it elsewhere with "
            "save_to_disk and name that folder"
        ) from error


def _rows_of_folder(
    id: str,
    folder: Path,
    key: str,
    split: str,
    version: Mapping[str, str | None],
    prefix: str,
    files: str,
) -> Any:
    from datasets import Dataset, load_from_disk

    if os.sep not in id:
        # Only what looks like a path goes into a fingerprint by its content.
        raise UserError(f"{prefix}.id={id}: there is a folder of that name; name it ./{id}")
    for name, value in version.items():
        if value is not None:
            raise UserError(f"{prefix}.{name}={value}: a folder has none; set it to null")
    try:
        found = load_from_disk(str(folder))
    except Exception as error:  # the library raises whatever a broken folder makes it
        raise UserError(
            f"{prefix}.id={id}: the folder holds no data set: {one_line(error)}; expected what "
            f"save_to_disk wrote; for a folder of files take {files}"
        ) from error
    name = split.partition("[")[0]
    if isinstance(found, Dataset):
        if name != "train":
            way_out = (
                "train or a slice of it"
                if key == "train_split"
                else "null to hold documents out of it"
            )
            raise UserError(
                f"{prefix}.{key}={split}: the folder {id} has no splits, its rows are the training "
                f"part; set {prefix}.{key}={way_out}"
            )
        return _part(found, split, f"{prefix}.{key}={split}")
    if name not in found:
        raise UserError(
            f"{prefix}.{key}={split}: the folder {id} has no such split; it has "
            f"{', '.join(map(str, found))}{did_you_mean(name, map(str, found))}"
        )
    return _part(found[name], split, f"{prefix}.{key}={split}")


def _part(rows: Any, split: str, where: str) -> Any:
    """Return the slice of a split that `train[:1000]` or `train[10%:]` names, read as the hub's."""
    from datasets import ReadInstruction

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({split.partition("[")[0]: len(rows)})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{where}: {error}; expected a split or a slice of one, such as train[:1000]"
        ) from error
    ((start, stop),) = [
        (part.from_ or 0, len(rows) if part.to is None else part.to) for part in parts
    ]
    return rows if (start, stop) == (0, len(rows)) else rows.select(range(start, stop))
