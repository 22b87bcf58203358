"""Lightning's logger of step series in a file."""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment

from stillhouse.tracking.series import append_rows, read_series


class SeriesLogger(Logger):
    """Append (stage, step, metric, value) rows to a file, a row a number.

    The long form needs no header known in advance and survives a kill. When training goes on from
    a checkpoint, rows behind it are dropped, so that a resumed series equals an uninterrupted one.
    """

    def __init__(self, path: Path, stage: str) -> None:
        super().__init__()
        self.path = path
        self.stage = stage

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.stage

    @property
    def version(self) -> str:
        """A series has one version."""
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> Path:
        """The file."""
        return self.path

    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: `config.yaml` is the record."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row a metric; Lightning's `epoch` is left out, a stage has one."""
        rows = [
            (self.stage, step, name, float(v)) for name, v in metrics.items() if name != "epoch"
        ]
        append_rows(self.path, rows)

    def drop_after(self, step: int) -> None:
        """Drop the rows of steps that are about to be done again."""
        if self.path.exists():
            rows = [row for row in read_series(self.path) if row[1] < step]
            self.path.unlink()
            append_rows(self.path, rows)
