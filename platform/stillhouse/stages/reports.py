"""What the parts of a stage have to say of their work: numbers, lines for the user, pictures."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from stillhouse.stages.artifacts import Number
from stillhouse.stages.stage import StageContext


@runtime_checkable
class Reporting(Protocol):
    """A part of a stage, data or a callback, that has something to say of what it did."""

    def report(self) -> Mapping[str, Number]:
        """Return numbers for the stage's metrics, units in the names."""
        ...

    def remarks(self) -> Sequence[str]:
        """Return what the user should read, in lines."""
        ...


@runtime_checkable
class Drawing(Protocol):
    """A callback that has something to show."""

    def pictures(self) -> Mapping[str, Callable[[Path], Path]]:
        """Return by name what draws a PNG to a path, and returns the path."""
        ...


def heard(context: StageContext, parts: Iterable[object]) -> Mapping[str, Number]:
    """Speak the remarks of parts that have some, and return what they report."""
    reports: dict[str, Number] = {}
    for part in parts:
        if isinstance(part, Reporting):
            reports |= part.report()
            for remark in part.remarks():
                context.console.print(f"{context.name}: {remark}")
    return reports


def draw(context: StageContext, parts: Iterable[object]) -> None:
    """Draw what parts have to show into the artifact, and log it."""
    for part in parts:
        if isinstance(part, Drawing):
            for name, picture in part.pictures().items():
                context.tracker.picture(name, picture(context.output / f"{name}.png"))
