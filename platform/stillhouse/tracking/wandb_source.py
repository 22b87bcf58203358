"""Runs from Weights & Biases alone: the records that run directories give, without the directories.

A run is one W&B run a stage; the facts in their configs join them (`wandb_facts`). A stage that
came from the cache has no W&B run in its run: its series is that of the W&B run that made the
artifact, found by the artifact's name, wherever in the project it lies.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from stillhouse.errors import UserError, did_you_mean
from stillhouse.tracking.gather import Run, numbers_of
from stillhouse.tracking.leavings import Leavings
from stillhouse.tracking.wandb_api import open_api, runs_of, told
from stillhouse.tracking.wandb_facts import MODELS, StageFacts, split_config

SCHEME = "wandb:"
# JSON has no such numbers; W&B writes them as text.
NOT_FINITE = ("NaN", "Infinity", "-Infinity")

Rows = Sequence[tuple[str, int, str, float]]


@dataclass(frozen=True)
class Source:
    """A group of runs at W&B: a sweep, or the single runs of a recipe."""

    entity: str
    project: str
    group: str

    @property
    def path(self) -> str:
        """The project."""
        return f"{self.entity}/{self.project}"

    def __str__(self) -> str:
        """The source as an entry of `runs` names it."""
        return f"{SCHEME}{self.path}/{self.group}"


@dataclass(frozen=True)
class StageRun:
    """One W&B run.

    Attributes:
        id: unique in its project.
        name: the run's name and the stage's, `<name>/<stage>`.
        state: `finished`, `failed`, `crashed`, `killed`, `running` …
        url: where it is shown.
        written: when it was last heard of, seconds since the epoch.
        facts: what joins it with the other stages of its run.
        config: the run's resolved config.
        summary: final numbers.
        history: fetches its rows.
    """

    id: str
    name: str
    state: str
    url: str
    written: float
    facts: StageFacts
    config: Mapping[str, Any]
    summary: Mapping[str, Any]
    history: Callable[[], Sequence[Mapping[str, Any]]]


def parse_source(entry: str) -> Source:
    """Read an entry of `runs` that begins with `wandb:`.

    Raises:
        UserError: when it does not name entity, project and group.
    """
    parts = entry.removeprefix(SCHEME).split("/", 2)
    if len(parts) != 3 or not all(part.strip() for part in parts):
        raise UserError(
            f"runs: {entry}: expected wandb:<entity>/<project>/<group>, such as "
            "wandb:me/stillhouse/word_kd; the group of a sweep is its folder's name, that of a "
            "single run the recipe's"
        )
    return Source(*parts)


def read_sources(entries: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Read groups at W&B; return the finished runs, and a line for each that is left out.

    Raises:
        UserError: for an entry that is malformed or leads to no W&B run, or when W&B cannot be
            asked.
    """
    sources = list(dict.fromkeys(map(parse_source, entries)))
    runs, left_out = [], []
    for source in sources:
        api = open_api(f"runs: {source}")
        with told(f"runs: {source}"):
            found = _found(api, source, {"group": source.group})
            if not found:
                raise UserError(_no_such_group(api, source))
            ours = [run for run in map(_stage_run, found) if run is not None]
            makers = _makers(api, source, ours)
            more, lines = join_stages(source, ours, makers)
        runs += more
        left_out += lines
        if len(found) > len(ours):
            left_out.append(
                f"{source}: {len(found) - len(ours)} W&B runs of the group are left out: their "
                "config does not say which run they are a stage of (written by other code, "
                "or by an older version)"
            )
    return runs, left_out


def join_stages(
    source: Source, stages: Sequence[StageRun], makers: Mapping[str, StageRun]
) -> tuple[list[Run], list[str]]:
    """Join W&B runs of stages to runs; return the finished ones, and a line for each other.

    Args:
        source: where they come from.
        stages: W&B runs of a group.
        makers: artifact's name -> the W&B run that made it, for stages that came from the cache.
    """
    joined: dict[str, dict[str, StageRun]] = defaultdict(dict)
    for stage in stages:
        joined[stage.facts.run][stage.facts.stage] = stage
    series: dict[str, Rows] = {}
    runs, left_out = [], []
    for own in joined.values():
        run = _join(source, own, makers, series)
        if isinstance(run, Run):
            runs.append(run)
        else:
            some = next(iter(own.values()))
            left_out.append(f"{_name(source, some)} is left out: {run}")
    return runs, left_out


def _join(
    source: Source,
    own: Mapping[str, StageRun],
    makers: Mapping[str, StageRun],
    series: dict[str, Rows],
) -> Run | str:
    """Return the run of some stages, or the reason why it cannot be compared."""
    newest = max(own.values(), key=lambda stage: stage.written)
    last = own.get(newest.facts.last_stage)
    if last is None or last.state != "finished":
        stage = last or newest
        return (
            f"its stage {stage.facts.stage} is {stage.state} at W&B, and the run is done with a "
            f"finished {stage.facts.last_stage}"
        )
    told = json.loads(last.summary.get(MODELS, "{}"))
    models = {role: numbers_of(metrics) for role, metrics in told.items()}
    if not any(models.values()):
        return "it is done but has no numbers of models; did its evaluation run?"
    rows, missing = [], ["read from W&B: pictures and continuations are shown there"]
    for artifact in last.facts.artifacts:
        name = artifact.rpartition("-")[0]
        stage = own.get(name)
        if stage is None or stage.state != "finished":
            stage = makers.get(artifact, stage)
        if stage is None:
            missing.append(f"no curves of {name}: it came from a cache, and W&B lacks who made it")
            continue
        if stage.id not in series:
            series[stage.id] = list(_rows(name, stage.history()))
        rows += series[stage.id]
    return Run(
        name=_name(source, last),
        folder=None,
        recipe=last.config["recipe"],
        config_hash=last.facts.config_hash,
        seed=int(last.config["seed"]),
        overrides=tuple(last.facts.overrides),
        models=models,
        config=last.config,
        series=tuple(rows),
        written=last.written,
        leavings=Leavings((), (), (), {n: s.url for n, s in own.items()}, tuple(missing)),
    )


def _name(source: Source, stage: StageRun) -> str:
    return f"{source}: {stage.name.removesuffix(f'/{stage.facts.stage}')}"


def _rows(
    stage: str, history: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[str, int, str, float]]:
    """Yield the numbers of the steps; tables and pictures have none."""
    for row in history:
        for metric, value in row.items():
            if "step" not in row or metric == "step" or metric.startswith("_"):
                continue
            if value in NOT_FINITE or (isinstance(value, int | float) and type(value) is not bool):
                yield stage, int(row["step"]), metric, float(value)


def _found(api: Any, source: Source, filters: Mapping[str, Any]) -> list[Any]:
    """Return the W&B runs of a project, config and summary with them."""
    return list(runs_of(api, f"runs: {source}", source.path, filters=dict(filters), lazy=False))


def _no_such_group(api: Any, source: Source) -> str:
    newest = api.runs(source.path, order="-created_at", per_page=50)
    groups = list(dict.fromkeys(run.group for run in newest[:50] if run.group))
    there = f"its newest runs are of {', '.join(groups)}" if groups else "it has no groups"
    return (
        f"runs: {source}: the project {source.path} has no run of the group {source.group}; "
        f"{there}{did_you_mean(source.group, groups)}"
    )


def _makers(api: Any, source: Source, stages: Sequence[StageRun]) -> dict[str, StageRun]:
    """Return who made what stages took from the cache, by the artifact's name."""
    made = {stage.facts.artifact for stage in stages}
    wanted = {name for stage in stages for name in stage.facts.artifacts} - made
    found = _found(api, source, {"config.artifact": {"$in": sorted(wanted)}}) if wanted else []
    makers = [run for run in map(_stage_run, found) if run and run.state == "finished"]
    return {
        **{stage.facts.artifact: stage for stage in stages if stage.state == "finished"},
        **{stage.facts.artifact: stage for stage in makers},
    }


def _stage_run(run: Any) -> StageRun | None:
    """Read what the client says of a W&B run; None where it has no facts of ours."""
    try:
        facts, config = split_config(run.config)
    except KeyError:
        return None
    return StageRun(
        id=run.id,
        name=run.name,
        state=run.state,
        url=run.url,
        written=_seconds(run.heartbeat_at or run.created_at),
        facts=facts,
        config=config,
        summary=run.summary,
        # What the client keeps of an earlier scan may be older than a run that went on.
        history=lambda: list(run.scan_history(use_cache=False)),
    )


def _seconds(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()
