"""What the parts of a stage have to say of their work: numbers for metrics, lines for the user."""

from collections.abc import Iterable, Mapping, Sequence
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


def heard(context: StageContext, parts: Iterable[object]) -> Mapping[str, Number]:
    """Speak the remarks of parts that have some, and return what they report."""
    reports: dict[str, Number] = {}
    for part in parts:
        if isinstance(part, Reporting):
            reports |= part.report()
            for remark in part.remarks():
                context.console.print(f"{context.name}: {remark}")
    return reports
