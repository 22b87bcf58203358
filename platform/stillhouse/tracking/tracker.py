"""Where a stage's numbers, tables and pictures go."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch.loggers import Logger

from stillhouse.files import SERIES
from stillhouse.tracking.lineage import StageArtifact
from stillhouse.tracking.loggers import SeriesLogger
from stillhouse.tracking.runs import Models, RunInfo


class StageTracker(Protocol):
    """What a stage logs to while it runs."""

    @property
    def loggers(self) -> list[Logger]:
        """Lightning's loggers of step series."""
        ...

    def uses(self, inputs: Sequence[StageArtifact]) -> None:
        """Say which artifacts the stage is made from."""
        ...

    def made(self, output: StageArtifact) -> None:
        """Say which artifact the stage made, once it stands."""
        ...

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add what is known only once the stage has built its objects to the run's config."""
        ...

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a table."""
        ...

    def picture(self, name: str, path: Path) -> None:
        """Log a PNG that lies at `path`."""
        ...

    def summarise(self, metrics: Mapping[str, float], models: Models, earlier: Models) -> None:
        """Log a stage's final numbers.

        Args:
            metrics: of the stage itself.
            models: numbers that the stage measured, by role.
            earlier: numbers of the stages before it, cached ones among them.
        """
        ...


class Tracking(Protocol):
    """Opens a tracker for a stage and closes it in all cases, a failed stage as failed."""

    def stage(
        self, run: RunInfo, name: str, kind: str, folder: Path
    ) -> AbstractContextManager[StageTracker]:
        """Track one stage.

        Args:
            run: what is known of the whole run.
            name: key of the stage in the recipe.
            kind: class of the stage.
            folder: scratch folder of the stage; its series lies there.
        """
        ...


class FileTracker:
    """The series in the run directory and nothing else."""

    def __init__(self, series: SeriesLogger | None) -> None:
        self.series = series

    @property
    def loggers(self) -> list[Logger]:
        """The CSV series, or nothing."""
        return [self.series] if self.series is not None else []

    def uses(self, inputs: Sequence[StageArtifact]) -> None:
        """Do nothing: the stage's node names its inputs."""

    def made(self, output: StageArtifact) -> None:
        """Do nothing: the artifact has its manifest."""

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Do nothing: `config.yaml` and the stage's metrics hold the facts."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Do nothing: the stage wrote the table to its artifact."""

    def picture(self, name: str, path: Path) -> None:
        """Do nothing: the stage drew the picture into its artifact."""

    def summarise(self, metrics: Mapping[str, float], models: Models, earlier: Models) -> None:
        """Do nothing: `results.json` holds the numbers."""


class CsvTracking:
    """`tracking=csv`: `metrics.csv` in the run directory."""

    @contextmanager
    def stage(self, run: RunInfo, name: str, kind: str, folder: Path) -> Iterator[FileTracker]:
        """Track one stage in a file."""
        yield FileTracker(SeriesLogger(folder / SERIES, name))


class NoTracking:
    """`tracking=none`: final numbers only, no series."""

    @contextmanager
    def stage(self, run: RunInfo, name: str, kind: str, folder: Path) -> Iterator[FileTracker]:
        """Track nothing."""
        yield FileTracker(None)
