"""A user's own files as a corpus: text, JSON lines or parquet."""

import glob
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillhouse.data.corpora.corpus import Corpus, Split
from stillhouse.data.corpora.held_out import with_held_out
from stillhouse.data.corpora.lines import json_records, lines
from stillhouse.data.corpora.records import RecordKeys
from stillhouse.data.documents import Document
from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".parquet")
EXPECTED = "expected a .txt, .jsonl or .parquet file, a folder of them, or a glob"


def files(
    *,
    train_path: str,
    validation_path: str | None = None,
    test_path: str | None = None,
    text_key: str = "text",
    messages_key: str = "messages",
    document_separator: str | None = "\n\n",
    held_out: float = 0.05,
    name: str | None = None,
    licence: str = "unknown",
) -> Corpus:
    """Read local files, in UTF-8.

    A `.txt` is cut into documents, empty ones dropped; a `.jsonl` has a record a line, blank lines
    left out; a `.parquet` has a record a row, counted from 0. `RecordKeys` says what a record is.

    Args:
        train_path: a file, a folder whose files with these suffixes are read, or a glob; in the
            order of their names.
        validation_path, test_path: the same; null holds documents out of the training ones.
        text_key, messages_key: where a record holds a text or a conversation.
        document_separator: stands between the documents of a `.txt`; null takes a file as one.
        held_out: share of the training documents for each split without files of its own.
        name: of the corpus; null takes that of `train_path`.
        licence: of the texts.

    Raises:
        UserError: for a path that leads to no such file, a file that cannot be read or holds
            nothing, and a record that is no document; file and line are named.
    """
    if document_separator == "":
        raise UserError(
            "data.corpus.document_separator is empty; expected what stands between the documents "
            r'of a .txt, such as "\n\n", or null to take a file as one document'
        )
    source = _Files(RecordKeys(text_key, messages_key), document_separator)
    named: dict[Split, str | None] = {"validation": validation_path, "test": test_path}
    return Corpus(
        name=name or Path(train_path).name,
        licence=licence,
        splits=with_held_out(
            source.documents("train_path", train_path),
            {s: source.documents(f"{s}_path", p) for s, p in named.items() if p is not None},
            held_out=held_out,
            naming="data.corpus.{split}_path=<file>",
        ),
    )


@dataclass(frozen=True)
class _Files:
    """How files are read."""

    keys: RecordKeys
    separator: str | None

    def documents(self, key: str, value: str) -> list[Document]:
        """Return the documents of every file that a path of the config names."""
        whole = f"data.corpus.{key}={value}"
        documents: list[Document] = []
        for path in _paths(whole, value):
            # Of several files, a message says in which one.
            place = whole if Path(value).expanduser() == path else f"{whole}, {path}"
            if path.stat().st_size == 0:
                raise UserError(f"{place}: the file is empty; expected documents in it")
            read = {".txt": self._text, ".jsonl": self._json_lines, ".parquet": self._parquet}
            found = list(read[path.suffix.lower()](path, place))
            if not found:
                raise UserError(f"{place}: the file holds no document; fill it or leave it out")
            documents += found
        return documents

    def _text(self, path: Path, place: str) -> Iterator[Document]:
        text = "".join(f"{line}\n" for _, line in lines(path, place)).removesuffix("\n")
        parts = [text] if self.separator is None else text.split(self.separator)
        for part in parts:
            document = part.strip("\n")
            if document.strip():
                yield document

    def _json_lines(self, path: Path, place: str) -> Iterator[Document]:
        for where, record in json_records(path, place, example='{"text": "…"}'):
            yield self.keys.document(record, where)

    def _parquet(self, path: Path, place: str) -> Iterator[Document]:
        for number, record in enumerate(_rows(path, place, self.keys)):
            yield self.keys.document(record, f"{place}, row {number}")


def _paths(whole: str, value: str) -> list[Path]:
    """Return the files that a path of the config names, in the order of their names."""
    path = Path(value).expanduser()
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not found:
            raise UserError(f"{whole}: the folder holds no such file; {EXPECTED}")
        return found
    if path.is_file():
        found = [path]
    elif glob.has_magic(value):
        matches = glob.glob(str(path), recursive=True)
        found = sorted(p for p in map(Path, matches) if p.is_file())
        if not found:
            raise UserError(f"{whole}: no file fits the pattern; {EXPECTED}")
    else:
        raise UserError(f"{whole}: there is no such file or folder; {EXPECTED}")
    for file in found:
        if file.suffix.lower() not in SUFFIXES:
            place = whole if file == path else f"{whole}, {file}"
            raise UserError(f"{place}: unknown suffix {file.suffix!r}; {EXPECTED}")
    return found


def _rows(path: Path, place: str, keys: RecordKeys) -> list[dict[str, Any]]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            table = file.read(columns=keys.columns(file.schema_arrow.names))
    except (ArrowException, OSError) as error:
        raise UserError(
            f"{place}: the file cannot be read as parquet: {one_line(error)}; write it anew"
        ) from error
    return table.to_pylist()
