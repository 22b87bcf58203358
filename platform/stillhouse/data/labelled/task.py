"""What a labelled set is: texts or pairs of texts, each with what is to be said of it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.corpora.records import kind_of
from stillhouse.data.tasks.exercises import HELD_OUT_SPLITS, split_of
from stillhouse.errors import UserError, did_you_mean

Label = int | float | tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """What is to be said of a text.

    Attributes:
        kind: `classification`, one of several classes; `regression`, a number; or `multi_label`,
            any of several classes.
        names: of the classes, in the order of their indices, or of a regression's one target.
    """

    kind: Literal["classification", "regression", "multi_label"]
    names: tuple[str, ...]

    @property
    def num_labels(self) -> int:
        """Number of classes, or 1 of a regression: the outputs of a head."""
        return len(self.names)

    def label(self, value: object, place: str) -> Label:
        """Return a label as it was read at `place`: a class is its index or its name.

        Returns:
            A class index, a number, or the sorted indices of the classes that hold.

        Raises:
            UserError: for a class that the task does not have, or a value of another kind.
        """
        if self.kind == "classification":
            return self._class(value, place)
        if self.kind == "multi_label":
            if not isinstance(value, Sequence) or isinstance(value, str):
                raise UserError(
                    f"{place}: the label is {kind_of(value)}; expected a list of classes, which "
                    "may be empty"
                )
            return tuple(sorted({self._class(v, place) for v in value}))
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{place}: the label is {kind_of(value)}; expected a number")
        if not math.isfinite(value):
            raise UserError(f"{place}: the label is {value}; expected a finite number")
        return float(value)

    def _class(self, value: object, place: str) -> int:
        if isinstance(value, str):
            if value in self.names:
                return self.names.index(value)
            raise UserError(
                f"{place}: the label {value!r} is no class; expected one of "
                f"{', '.join(self.names)}{did_you_mean(value, self.names)}"
            )
        if isinstance(value, bool) or not isinstance(value, int):
            raise UserError(
                f"{place}: the label is {kind_of(value)}; expected a class, by index or by name"
            )
        if not 0 <= value < len(self.names):
            raise UserError(
                f"{place}: the label {value} is outside the {len(self.names)} classes "
                f"{', '.join(self.names)}; expected 0 to {len(self.names) - 1}; mend it, or name "
                "all classes"
            )
        return value


@dataclass(frozen=True)
class Example:
    """A text, or a pair of texts, and its label.

    Attributes:
        text: the text.
        pair: what is read behind it, of a pair.
        label: as `Task.label` returns it; None of a text without one.
    """

    text: str
    pair: str | None = None
    label: Label | None = None


@dataclass(frozen=True)
class LabelledText:
    """Examples by split.

    Attributes:
        name: of the set, for tables and model cards.
        licence: of its texts.
        task: what the labels say.
        splits: examples of `train`, `validation` and `test`.
    """

    name: str
    licence: str
    task: Task
    splits: Mapping[Split, Sequence[Example]]


def held_out_by_content(
    train: Sequence[Example],
    given: Mapping[Split, Sequence[Example]],
    *,
    source: str,
    way_out: str = "give more",
) -> dict[Split, Sequence[Example]]:
    """Return all three splits, those that are not given held out of the training examples.

    The content's hash decides, as for exercises: equal texts stay in one split.

    Args:
        train: the training examples.
        given: the validation and test examples that the set has by itself.
        source: of the training examples, key and value.
        way_out: what mends a split that is left empty, `{split}` standing for the split.

    Raises:
        UserError: for a split that is left empty.
    """
    missing: list[Split] = ["train", *(s for s in HELD_OUT_SPLITS if s not in given)]
    parts: dict[Split, list[Example]] = {split: [] for split in missing}
    for example in train:
        split = split_of(content_of(example))
        parts[split if split in parts else "train"].append(example)
    for split, examples in parts.items():
        if not examples:
            own = way_out.format(split="validation" if split == "train" else split)
            raise UserError(f"{source}: none of its examples falls to {split}; {own}")
    return {**parts, **given}


def content_of(example: Example) -> str:
    """Return what decides an example's split: its texts, without the label."""
    return example.text if example.pair is None else f"{example.text}\n{example.pair}"
