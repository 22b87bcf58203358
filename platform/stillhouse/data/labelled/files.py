"""A user's own labelled texts, in JSON lines."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.corpora.lines import json_records
from stillhouse.data.corpora.records import filled, kind_of, listed
from stillhouse.data.labelled.task import Example, LabelledText, Task, held_out_by_content
from stillhouse.errors import UserError

KEY = "data.corpus"
EXAMPLE = '{"text": "…", "label": …}'


def labelled_files(
    *,
    train_path: str,
    validation_path: str | None = None,
    test_path: str | None = None,
    kind: Literal["classification", "regression", "multi_label"] = "classification",
    names: Sequence[str],
    name: str | None = None,
    licence: str = "unknown",
) -> LabelledText:
    """Read examples: a line holds `text`, `label`, and perhaps `pair`, a second text.

    A label is a class, by index or by name; of a regression a number; of several labels a list of
    classes. Other keys are left out, and a key whose value is null counts as absent.

    Args:
        train_path: a .jsonl file.
        validation_path, test_path: the same; null holds a tenth of the training ones out.
        kind: of the labels.
        names: of all classes, in the order of their indices, or of a regression's one target.
        name: of the set; null takes that of `train_path`.
        licence: of the texts.

    Raises:
        UserError: for a file that cannot be read, a line without a text or a label, and a label
            that is none of the task's; file and line are named.
    """
    task = _task(kind, [str(name) for name in names])
    named: dict[Split, str | None] = {"validation": validation_path, "test": test_path}
    given: dict[Split, list[Example]] = {
        s: _read(f"{KEY}.{s}_path", p, task) for s, p in named.items() if p is not None
    }
    splits = held_out_by_content(
        _read(f"{KEY}.train_path", train_path, task),
        given,
        source=f"{KEY}.train_path={train_path}",
        way_out=f"give more, or name {KEY}.{{split}}_path=<file>",
    )
    return LabelledText(name or Path(train_path).name, licence, task, splits)


def _task(
    kind: Literal["classification", "regression", "multi_label"], names: Sequence[str]
) -> Task:
    fewest = {"classification": 2, "regression": 1, "multi_label": 1}
    if kind not in fewest:
        raise UserError(f"{KEY}.kind={kind}: expected one of {', '.join(fewest)}")
    right = len(names) == 1 if kind == "regression" else len(names) >= fewest[kind]
    if not right or len(set(names)) < len(names):
        count = "one target" if kind == "regression" else f"{fewest[kind]} classes or more"
        raise UserError(
            f"{KEY}.names=[{','.join(names)}]: expected the names of {count}, all different, for "
            f"{KEY}.kind={kind}"
        )
    return Task(kind, tuple(names))


def _read(key: str, value: str, task: Task) -> list[Example]:
    path, place = Path(value).expanduser(), f"{key}={value}"
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        raise UserError(f"{place}: expected a .jsonl file, with lines such as {EXAMPLE}")
    examples = list(_examples(path, place, task))
    if not examples:
        raise UserError(f"{place}: the file holds no example; expected lines such as {EXAMPLE}")
    return examples


def _examples(path: Path, place: str, task: Task) -> Iterator[Example]:
    for where, record in json_records(path, place, example=EXAMPLE):
        if not isinstance(record, Mapping):
            raise UserError(f"{where}: the record is {kind_of(record)}; expected {EXAMPLE}")
        present = {str(key): value for key, value in record.items() if value is not None}
        for key in ("text", "label"):
            if key not in present:
                raise UserError(
                    f"{where}: the record has no {key!r}; it has {listed(present)}; expected "
                    f"{EXAMPLE}; write it, or drop the record; text without labels is read with "
                    "stillhouse.data.corpora.files.files"
                )
        yield Example(
            filled(present["text"], "'text'", where),
            filled(present["pair"], "'pair'", where) if "pair" in present else None,
            task.label(present["label"], where),
        )
