"""Folding runs: groups of repeats, their means and their differences; pure functions on records."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from stillhouse.config.essence import CONDUCT
from stillhouse.errors import UserError, did_you_mean
from stillhouse.stages.fingerprint import NEUTRAL_KEYS
from stillhouse.tracking.gather import Run
from stillhouse.tracking.intervals import Estimate, estimate

QUALITY = GAP_METRIC = "test_nll"
GAP_CLOSED = "gap_closed"
# On the horizontal axis where no metric is asked for.
SIZE = "parameters"
# Keys that do not tell groups apart: repeats differ in them, or the label says it already.
# `debug` changes sizes and steps, so it does.
UNTOLD = {*CONDUCT, *NEUTRAL_KEYS, "seed", "experiment"} - {"debug"}

Value = TypeVar("Value")


@dataclass(frozen=True)
class Group:
    """Runs of one setting, one a seed.

    Attributes:
        label: the recipe, and the overrides that set the group apart from the others.
        runs: in the order of their seeds.
    """

    label: str
    runs: tuple[Run, ...]

    @property
    def recipe(self) -> str:
        """The recipe of its runs."""
        return self.runs[0].recipe

    @property
    def roles(self) -> list[str]:
        """The roles of its runs, in the order of their first appearance."""
        return list(dict.fromkeys(role for run in self.runs for role in run.models))

    def values(self, role: str, metric: str) -> dict[int, float]:
        """Return seed -> number, for the seeds that have it."""
        return {
            run.seed: run.models[role][metric]
            for run in self.runs
            if metric in run.models.get(role, {})
        }


@dataclass(frozen=True)
class Baseline:
    """What rows are compared with: another role of the same runs, or the same role of a group.

    Attributes:
        text: as the user gave it.
        role: of the same run; None where a group is the baseline.
        group: whose same role is the baseline; None where a role is.
    """

    text: str
    role: str | None = None
    group: Group | None = None

    def of(self, group: Group, role: str) -> tuple[Group, str] | None:
        """Return the (group, role) that a row is compared with; None for the baseline itself."""
        if (group is self.group) or (role == self.role):
            return None
        return (self.group or group, self.role or role)


@dataclass(frozen=True)
class Cell:
    """One metric of one role in one group.

    Attributes:
        group: label of the group.
        role: row of the recipe's table.
        metric: with its unit or definition in the name.
        value: over the seeds.
        difference: to the baseline, paired by seed; None where there is no pair.
    """

    group: str
    role: str
    metric: str
    value: Estimate
    difference: Estimate | None = None


@dataclass(frozen=True)
class Band:
    """A curve over repeats: their mean, and the lowest and the highest of them at each step."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Group runs by recipe and config; return the groups, and a line for each repeat left out."""
    newest: dict[tuple[str, str], dict[int, Run]] = defaultdict(dict)
    left_out = []
    for run in runs:
        seeds = newest[run.recipe, run.config_hash]
        other = seeds.get(run.seed)
        if other is not None:
            older, run = sorted((other, run), key=lambda r: r.written)
            left_out.append(f"{older.name} is left out: {run.name} is a newer run of its seed")
        seeds[run.seed] = run
    groups = [
        Group(recipe, tuple(seeds[s] for s in sorted(seeds)))
        for (recipe, _), seeds in newest.items()
    ]
    return _labelled(groups), left_out


def _labelled(groups: Sequence[Group]) -> list[Group]:
    """Name each group by its recipe and the overrides that not every group has."""
    told = [overrides_told(group) for group in groups]
    common = set.intersection(*map(set, told)) if told else set()
    labels = [
        " ".join([group.label, *(o for o in overrides if o not in common)])
        for group, overrides in zip(groups, told, strict=True)
    ]
    # Groups that no override tells apart differ in a YAML file.
    return [
        replace(
            g, label=f"{label} #{g.runs[0].config_hash[:6]}" if labels.count(label) > 1 else label
        )
        for g, label in zip(groups, labels, strict=True)
    ]


def overrides_told(group: Group) -> list[str]:
    """Return the overrides that all runs of a group have, without those that change no result."""
    shared = set.intersection(*(set(run.overrides) for run in group.runs))
    kept = []
    for override in group.runs[0].overrides:
        key = override.lstrip("+~").partition("=")[0]
        root, *below = re.split(r"[./@]", key)
        if override in shared and root not in UNTOLD and not NEUTRAL_KEYS.intersection(below):
            kept.append(override.lstrip("+"))
    return kept


def known_metrics(groups: Sequence[Group]) -> list[str]:
    """Return the metrics of all models, in the order of their first appearance."""
    runs = [run for group in groups for run in group.runs]
    return list(dict.fromkeys(m for run in runs for role in run.models.values() for m in role))


def choose_metrics(
    groups: Sequence[Group], wanted: Sequence[str] | None, x: str = SIZE, y: str | None = None
) -> list[str]:
    """Return the metrics to show: those wanted, or all, and those asked for on an axis.

    Args:
        groups: all groups of the comparison.
        wanted: columns of the table; None wants every metric that one of the runs has.
        x: metric on the horizontal axis; `parameters` asks for nothing.
        y: metric on the vertical axis; None asks for nothing.

    Raises:
        UserError: for a metric that no model has.
    """
    known = known_metrics(groups)
    asked = [("metrics", name) for name in wanted or known]
    asked += [("x", x)] if x != SIZE else []
    asked += [("y", y)] if y is not None else []
    for key, name in asked:
        if name not in known:
            raise UserError(
                f"{key}: no model has {name!r}; the runs have {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )
    return list(dict.fromkeys(name for _, name in asked))


def fold(groups: Sequence[Group], metrics: Sequence[str], baseline: Baseline | None) -> list[Cell]:
    """Fold the seeds of every (group, role, metric), and its difference to the baseline."""
    cells = []
    for group in groups:
        for role in group.roles:
            other = baseline.of(group, role) if baseline else None
            for metric in metrics:
                values = group.values(role, metric)
                value = estimate(list(values.values()))
                if value is None:
                    continue
                against = other[0].values(other[1], metric) if other else {}
                pairs = [values[s] - against[s] for s in values if s in against]
                cells.append(Cell(group.label, role, metric, value, estimate(pairs)))
    return cells


def close_gaps(groups: Sequence[Group], role: str) -> tuple[list[Cell], list[str]]:
    """Fold (baseline - role) / (baseline - teacher) of the test NLL, seed by seed.

    Args:
        groups: those without the role or a `teacher` are passed over.
        role: the baseline's.

    Returns:
        The cells, and a line for each group whose teacher leaves no gap to close.
    """
    cells, left_out = [], []
    for group in groups:
        baseline, teacher = group.values(role, GAP_METRIC), group.values("teacher", GAP_METRIC)
        gaps = {s: baseline[s] - teacher[s] for s in baseline if s in teacher}
        if role == "teacher" or not gaps:
            continue
        # A ratio over a gap of the wrong sign would praise a student for getting worse.
        if not all(gap > 0 for gap in gaps.values()):
            left_out.append(
                f"{GAP_CLOSED} of {group.label} is left out: its teacher is not better than "
                f"{role} in {GAP_METRIC} for every seed"
            )
            continue
        for other in group.roles:
            numbers = group.values(other, GAP_METRIC)
            closed = [(baseline[s] - numbers[s]) / gaps[s] for s in gaps if s in numbers]
            value = estimate(closed)
            if other not in (role, "teacher") and value is not None:
                cells.append(Cell(group.label, other, GAP_CLOSED, value))
    return cells, left_out


def fold_curves(groups: Sequence[Group], metric: str) -> dict[tuple[str, str], Band]:
    """Fold a step series over the runs of a group: (group, stage) -> band."""
    bands = {}
    for group in groups:
        stages: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
        for run in group.runs:
            for stage, step, name, value in run.series:
                if name == metric:
                    stages[stage][run.seed][step] = value
        for stage, curves in stages.items():
            # A mean over other runs at other steps would jump: only steps that all of them have.
            steps = sorted(set.intersection(*map(set, curves.values())))
            columns = [[curve[step] for curve in curves.values()] for step in steps]
            bands[group.label, stage] = Band(
                steps=tuple(steps),
                mean=tuple(sum(column) / len(column) for column in columns),
                low=tuple(map(min, columns)),
                high=tuple(map(max, columns)),
            )
    return bands


def short_labels(values: Mapping[tuple[str, str], Value]) -> dict[str, Value]:
    """Label (group, name) by the name alone where all groups have the same value, a shared teacher.

    Of a shared one, one is kept.
    """
    by_name: dict[str, list[Value]] = defaultdict(list)
    for (_, name), value in values.items():
        by_name[name].append(value)
    shared = {name for name, found in by_name.items() if all(v == found[0] for v in found)}
    return {
        name if name in shared else f"{group}: {name}": value
        for (group, name), value in values.items()
    }
