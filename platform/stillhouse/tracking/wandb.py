"""Weights & Biases: one run a stage, all runs of a sweep in one group.

A stage's run has the stage's name as its job type, so that the same curve of teacher, baseline and
student lies in one chart. The x-axis is our own `step` (`define_metric`), since W&B's step cannot
go back when a killed stage goes on. Run ids are kept in the run directory: a resumed stage writes
to the run that it began; the addresses of online ones lie beside them, for `compare`'s links.
Under `wandb agent` one stage's run is the agent's (`sweep_agent.py`).
"""

import json
import os
import secrets
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger, WandbLogger

from stillhouse.errors import UserError, did_you_mean
from stillhouse.files import SERIES, WANDB_URLS, write_json
from stillhouse.tracking.lineage import StageArtifact, as_wandb_artifact
from stillhouse.tracking.loggers import SeriesLogger
from stillhouse.tracking.runs import Models, RunInfo
from stillhouse.tracking.series import read_series
from stillhouse.tracking.sweep_agent import Agent, agent_of_this_process
from stillhouse.tracking.wandb_facts import facts_of, numbers_so_far

IDS = "wandb_ids.json"
# Steps that are sent again at the seam of a resumed stage: what was on its way when the run was
# killed may have come to the summary and not to the rows.
MARGIN = 5
# Where an agent says that the runs of its sweep go.
OF_THE_SWEEP = {"project": "WANDB_PROJECT", "entity": "WANDB_ENTITY"}


class StepWandbLogger(WandbLogger):
    """Lightning's logger with the step as an ordinary metric.

    The client sends every 15 seconds: of a killed run the last steps are lacking, while those
    behind its last checkpoint are done again. When training goes on, the file's rows make good
    what lacks from step `lacking` on, and earlier steps are not sent again.
    """

    def __init__(self, run: Any, series: SeriesLogger, lacking: int | None) -> None:
        super().__init__(experiment=run)
        self._series = series
        self._lacking = lacking
        self._goes_on = lacking is not None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log metrics of a step; the trainer's `epoch` is left out, a stage has one."""
        if self._goes_on:
            self._goes_on = False
            self._make_good(step)
        self._log(step, {name: value for name, value in metrics.items() if name != "epoch"})

    def _make_good(self, before: int | None) -> None:
        """Log the file's rows up to the step at which training goes on."""
        rows = [r for r in read_series(self._series.path) if before is None or r[1] < before]
        for step, group in groupby(rows, key=lambda row: row[1]):
            self._log(step, {name: value for _, _, name, value in group})

    def _log(self, step: int | None, metrics: Mapping[str, float]) -> None:
        if self._lacking is None or step is None or step >= self._lacking:
            self.experiment.log({**metrics, "step": step})

    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Do nothing: the run's config was set when it began."""


class WandbTracker:
    """One open W&B run."""

    def __init__(
        self, run: Any, series: SeriesLogger, lacking: int | None, *, lineage: bool, upload: bool
    ) -> None:
        """Log to a run.

        Args:
            run: W&B's.
            series: the file beside it.
            lacking: first step of which W&B may lack a row; None for a stage that begins.
            lineage: whether artifacts are told.
            upload: whether their files are sent.
        """
        self.run = run
        self.series = series
        self.lineage = lineage and not run.disabled
        self.upload = upload
        self._logger = StepWandbLogger(run, series, lacking)

    @property
    def loggers(self) -> list[Logger]:
        """The CSV series and W&B."""
        return [self.series, self._logger]

    def uses(self, inputs: Sequence[StageArtifact]) -> None:
        """Name the inputs in the run's config and, which W&B can do only online, as its inputs."""
        if self.lineage:
            self.describe({"inputs": {used.stage: used.name for used in inputs}})
        if self.lineage and not self.run.offline:
            for used in inputs:
                self.run.use_artifact(as_wandb_artifact(used, upload=self.upload))

    def made(self, output: StageArtifact) -> None:
        """Log the artifact as the run's output."""
        if self.lineage:
            self.run.log_artifact(as_wandb_artifact(output, upload=self.upload))

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Add facts to the run's config; a stage that is made anew may have others."""
        self.run.config.update(dict(facts), allow_val_change=True)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Log a `wandb.Table`."""
        import wandb

        self.run.log({name: wandb.Table(columns=list(columns), data=[list(r) for r in rows])})

    def picture(self, name: str, path: Path) -> None:
        """Log a `wandb.Image`; the run keeps a copy of the file."""
        import wandb

        self.run.log({name: wandb.Image(str(path))})

    def summarise(self, metrics: Mapping[str, float], models: Models, earlier: Models) -> None:
        """Set the run's summary: `metric` of the stage, `role/metric` of the models."""
        self.run.summary.update({**metrics, **numbers_so_far(models, earlier)})
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
        sweep_stage: str | None = None,
        lineage: bool = True,
        upload: bool = False,
    ) -> None:
        """Describe where runs go.

        Args:
            project: W&B project.
            entity: W&B user or team; null takes the account's own.
            mode: `online`, `offline`, `disabled`, or `auto`: online with an API key, else offline.
            group: of the runs; null takes the sweep (under an agent W&B's), or the run itself.
            tags: of the runs; the recipe's name and the stage's class are added.
            sweep_stage: under `wandb agent`, the stage whose run is the sweep's, with its metric;
                null takes the recipe's last.
            lineage: whether artifacts and their edges are told, by reference.
            upload: whether the artifacts' files, weights among them, are sent too.
        """
        self.project = project
        self.entity = entity
        self.mode = mode
        self.group = group
        self.tags = tags or []
        self.sweep_stage = sweep_stage
        self.lineage = lineage
        self.upload = upload

    @contextmanager
    def stage(self, run: RunInfo, name: str, kind: str, folder: Path) -> Iterator[WandbTracker]:
        """Open a W&B run for one stage; finish it in all cases, as failed when the stage failed.

        Raises:
            UserError: under an agent, when the recipe has no stage `sweep_stage`.
        """
        agent = agent_of_this_process()
        is_agents = agent is not None and name == self._swept_stage(run)
        with nullcontext() if agent is None or is_agents else agent.unknown():
            wandb_run = self._begin(run, name, kind, agent, is_agents=is_agents)
            try:
                wandb_run.define_metric("step")
                wandb_run.define_metric("*", step_metric="step")
                series = SeriesLogger(folder / SERIES, name)
                yield WandbTracker(
                    wandb_run,
                    series,
                    _first_lacking(wandb_run, series.path),
                    lineage=self.lineage,
                    upload=self.upload,
                )
            except BaseException:
                wandb_run.finish(exit_code=1)
                raise
            wandb_run.finish()

    def _swept_stage(self, run: RunInfo) -> str:
        stages = [stage for stage, node in run.config["stages"].items() if node is not None]
        swept = self.sweep_stage or stages[-1]
        if swept not in stages:
            raise UserError(
                f"tracking.sweep_stage={swept}: this recipe has no stage of that name; its stages "
                f"are {', '.join(stages)}{did_you_mean(swept, stages)}"
            )
        return swept

    def _begin(
        self, run: RunInfo, name: str, kind: str, agent: Agent | None, *, is_agents: bool
    ) -> Any:
        """Begin a stage's W&B run, or go on with it; the agent's has its id and place from it."""
        import wandb

        ids_file = run.folder / IDS
        ids = json.loads(ids_file.read_text()) if ids_file.exists() else {}
        known = name in ids
        ids.setdefault(name, agent.run if agent and is_agents else secrets.token_hex(4))
        write_json(ids_file, ids)
        mode: Any = self.mode
        if mode == "auto" and os.environ.get("WANDB_MODE"):
            mode = None  # W&B reads the variable itself
        elif mode == "auto":
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        place = {"project": self.project, "entity": self.entity, "id": ids[name]}
        if agent is not None:  # the sweep's project, for all stages
            place |= {k: os.environ[v] for k, v in OF_THE_SWEEP.items() if v in os.environ}
        wandb_run = wandb.init(
            **({} if is_agents else place),
            mode=mode,
            resume="allow" if known and mode != "offline" else None,
            name=f"{run.name}/{name}",
            group=self.group or (run.group if agent is None else agent.sweep),
            job_type=name,
            tags=sorted({*self.tags, run.recipe, kind}),
            dir=run.folder,
            config={**run.config, **vars(facts_of(run, name, ids))},
            settings=wandb.Settings(silent=True, console="off", quiet=True),
        )
        _keep_url(run.folder / WANDB_URLS, name, wandb_run.url)
        return wandb_run


def _first_lacking(run: Any, series: Path) -> int | None:
    """Return the first step of which W&B may lack a row, where a stage goes on online.

    A stage that is made anew has no file yet; offline, W&B's files hold all that was logged.
    """
    if run.offline or run.disabled or not series.exists():
        return None
    last = run.summary.get("step") if run.resumed else None
    if last is None:
        return 0
    # The summary may be ahead of the rows, which are numbered; a step has one row or more.
    ahead = run.summary.get("_step", 0) + 1 - run.starting_step
    steps = sorted({row[1] for row in read_series(series) if row[1] <= last})
    return steps[max(0, len(steps) - 1 - ahead - MARGIN)] if steps else 0


def _keep_url(path: Path, stage: str, url: str | None) -> None:
    """Add a stage's address to the file; an offline run has none."""
    if url:
        urls = json.loads(path.read_text()) if path.exists() else {}
        write_json(path, {**urls, stage: url})
