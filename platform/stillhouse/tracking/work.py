"""The progress of a stage that trains nothing: a bar on a terminal, lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from stillhouse.tracking.progress import LOG_EVERY, short


class WorkProgress:
    """Counts units of work and shows how many there are a second."""

    def __init__(self, stage: str, total: int, unit: str, console: Console) -> None:
        """Describe the work.

        Args:
            stage: name of the stage.
            total: units in all.
            unit: what is counted, in the plural.
            console: where it is shown.
        """
        self.stage, self.total, self.unit, self.console = stage, total, unit, console
        self.done = 0
        self._skipped = 0
        self._note = ""
        self._began = self._shown = time.monotonic()
        self._bar: Progress | None = None

    def __enter__(self) -> "WorkProgress":
        """Open the bar."""
        if self.console.is_terminal:
            columns = TextColumn("[bold]{task.description}"), BarColumn()
            facts = TextColumn("{task.fields[facts]}"), TimeRemainingColumn()
            self._bar = Progress(*columns, *facts, console=self.console)
            self._bar.start()
            self._bar.add_task(self.stage, total=self.total, facts="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the bar, or say in one line what was done."""
        if self._bar is not None:
            self._bar.stop()
        elif error is None:
            self.console.print(self._line())

    def skip(self, units: int) -> None:
        """Count units that an earlier attempt has done."""
        self._skipped += units
        self.advance(units)

    def advance(self, units: int) -> None:
        """Count units, and show them at times."""
        self.done += units
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=self.done, facts=self._rate())
        elif now - self._shown > LOG_EVERY:
            self._shown = now
            self.console.print(self._line())

    def note(self, text: str) -> None:
        """Show a fact beside the rate."""
        self._note = f"  {text}"

    def seconds(self) -> float:
        """Return the time since the work began."""
        return max(time.monotonic() - self._began, 1e-9)

    def _rate(self) -> str:
        per_second = (self.done - self._skipped) / self.seconds()
        return f"{short(per_second)} {self.unit}/s{self._note}"

    def _line(self) -> str:
        return (
            f"{self.stage}: {short(self.done)} of {short(self.total)} {self.unit}  {self._rate()}"
        )
