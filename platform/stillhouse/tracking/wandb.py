"""Weights & Biases: one run a stage, all runs of a sweep in one group.

A stage's run has the stage's name as its job type, so that the same curve of teacher, baseline and
student lies in one chart. The x-axis is our own `step` (`define_metric`), since W&B's step cannot
go back when a killed stage goes on. Run ids are kept in the run directory: a resumed stage writes
to the run that it began; the addresses of online ones lie beside them, for `compare`'s links.
"""

import json
import os
import secrets
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger

from stillhouse.files import SERIES, WANDB_URLS, write_json
from stillhouse.tracking.loggers import SeriesLogger
from stillhouse.tracking.runs import RunInfo

IDS = "wandb_ids.json"


class StepWandbLogger(WandbLogger):
    """Lightning's logger with the step as an ordinary metric."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a step; the trainer's `epoch` is left out, a stage has one."""
        kept = {name: value for name, value in metrics.items() if name != "epoch"}
        self.experiment.log({**kept, "step": step})

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Do nothing: the run's config was set when it began."""


class WandbTracker:
    """One open W&B run."""

    def __init__(self, run: Any, series: SeriesLogger) -> None:
        self.run = run
        self.series = series
        self._logger = StepWandbLogger(experiment=run)

    @property
    def loggers(self) -> list[Logger]:
        """The CSV series and W&B."""
        return [self.series, self._logger]

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add facts to the run's config."""
        self.run.config.update(dict(facts))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a `wandb.Table`."""
        import wandb

        self.run.log({name: wandb.Table(columns=list(columns), data=[list(r) for r in rows])})

    def picture(self, name: str, path: Path) -> None:
        """Log a `wandb.Image`; the run keeps a copy of the file."""
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def summarise(
        self, metrics: Mapping[str, float], models: Mapping[str, Mapping[str, float]]
    ) -> None:
        """Set the run's summary: `metric` of the stage, `role/metric` of the models."""
        self.run.summary.update(dict(metrics))
        for role, numbers in models.items():
            self.run.summary.update({f"{role}/{name}": v for name, v in numbers.items()})


class WandbTracking:
    """`tracking=wandb`: W&B beside `metrics.csv`."""

    def __init__(
        self,
        *,
        project: str,
        entity: str | None = None,
        mode: Literal["auto", "online", "offline", "disabled"] = "auto",
        group: str | None = None,
        tags: list[str] | None = None,
    ) -> None:
        """Describe where runs go.

        Args:
            project: W&B project.
            entity: W&B user or team; null takes the account's own.
            mode: `online`, `offline`, `disabled`, or `auto`: online with an API key, else offline.
            group: of the runs; null takes the sweep, or the run itself.
            tags: of the runs; the recipe's name and the stage's class are added.
        """
        self.project = project
        self.entity = entity
        self.mode = mode
        self.group = group
        self.tags = tags or []

    @contextmanager
    def stage(self, run: RunInfo, name: str, kind: str, folder: Path) -> Iterator[WandbTracker]:
        """Open a W&B run for one stage; finish it in all cases, as failed when the stage failed."""
        import wandb

        ids_file = run.folder / IDS
        ids = json.loads(ids_file.read_text()) if ids_file.exists() else {}
        known = name in ids
        ids.setdefault(name, secrets.token_hex(4))
        write_json(ids_file, ids)
        mode: Any = self.mode
        if mode == "auto" and os.environ.get("WANDB_MODE"):
            mode = None  # W&B reads the variable itself
        elif mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        wandb_run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,
            id=ids[name],
            resume="allow" if known and mode != "offline" else None,
            name=f"{run.name}/{name}",
            group=self.group or run.group,
            job_type=name,
            tags=sorted({*self.tags, run.recipe, kind}),
            dir=run.folder,
            config={**run.config, "git": run.git, "stage": name, "config_hash": run.config_hash},
            settings=wandb.Settings(silent=True, console="off", quiet=True),
        )
        _keep_url(run.folder / WANDB_URLS, name, wandb_run.url)
        try:
            wandb_run.define_metric("step")
            wandb_run.define_metric("*", step_metric="step")
            yield WandbTracker(wandb_run, SeriesLogger(folder / SERIES, name))
        except BaseException:
            wandb_run.finish(exit_code=1)
            raise
        wandb_run.finish()


def _keep_url(path: Path, stage: str, url: str | None) -> None:
    """Add a stage's address to the file; an offline run has none."""
    if url:
        urls = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**urls, stage: url})
