"""The trade-off of two metrics: curves of a sweep, single points, levels; pure on records."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from stillhouse.tracking.folding import QUALITY, Group, Value, overrides_told, short_labels
from stillhouse.tracking.intervals import estimate


@dataclass(frozen=True)
class Point:
    """Two metrics of one role in one group: means over the seeds.

    Attributes:
        x: mean of the metric on the horizontal axis.
        y: mean of the other.
        x_sd: sample standard deviation; 0 for one run.
        y_sd: the same of the other.
    """

    x: float
    y: float
    x_sd: float = 0.0
    y_sd: float = 0.0


@dataclass(frozen=True)
class TradeOff:
    """What a picture of `y` against `x` shows, by label.

    Attributes:
        x: metric on the horizontal axis.
        y: metric on the vertical axis.
        curves: a role over a sweep, in the order of x, with two values of x at least.
        points: roles that are no curve.
        levels: mean of `y` of the roles that have no `x`; empty where there is no curve.
    """

    x: str
    y: str
    curves: Mapping[str, tuple[Point, ...]]
    points: Mapping[str, Point]
    levels: Mapping[str, float]


def choose_quality(metrics: Sequence[str], x: str, y: str | None) -> str | None:
    """Return the metric on the vertical axis: the one asked for, the test NLL, or the first."""
    others = [metric for metric in metrics if metric != x]
    return y or (QUALITY if QUALITY in others else next(iter(others), None))


def trade_off(groups: Sequence[Group], x: str, y: str) -> TradeOff:
    """Fold two metrics over the seeds; join the points of a role where the groups are a sweep."""
    points, levels = fold_points(groups, x, y)
    curves: dict[str, tuple[Point, ...]] = {}
    single: dict[tuple[str, str], Point] = {}
    labelled: dict[str, Point] = {}
    for role, found in points.items():
        joined, rest = _join([g for g in groups if g.label in found], found)
        alone = len(joined) == 1 and not rest
        curves |= {role if alone else f"{n}: {role}": curve for n, curve in joined.items()}
        if joined:
            # By the role alone it could not be told from the curve.
            labelled |= {f"{group}: {role}": point for group, point in rest.items()}
        else:
            single |= {(group, role): point for group, point in rest.items()}
    levels = {key: value for key, value in levels.items() if curves and key[1] not in points}
    recipes = {group.label: group.recipe for group in groups}
    return TradeOff(x, y, curves, _short(single, recipes) | labelled, _short(levels, recipes))


def fold_points(
    groups: Sequence[Group], x: str, y: str
) -> tuple[dict[str, dict[str, Point]], dict[tuple[str, str], float]]:
    """Return role -> group -> point, and (group, role) -> y where there is no x."""
    points: dict[str, dict[str, Point]] = {}
    levels: dict[tuple[str, str], float] = {}
    for group in groups:
        for role in group.roles:
            across = estimate(list(group.values(role, x).values()))
            up = estimate(list(group.values(role, y).values()))
            if up is None or not math.isfinite(up.mean):
                continue
            if across is None:
                levels[group.label, role] = up.mean
            elif math.isfinite(across.mean):
                point = Point(across.mean, up.mean, across.sd or 0.0, up.sd or 0.0)
                points.setdefault(role, {})[group.label] = point
    return points, levels


def _short(values: Mapping[tuple[str, str], Value], recipes: Mapping[str, str]) -> dict[str, Value]:
    """Label (group, role) by the role, or by recipe and role, where that says which it is."""
    found: dict[tuple[str, str], list[Value]] = {}
    for (group, role), value in values.items():
        found.setdefault((recipes[group], role), []).append(value)
    shared = {key for key, equal in found.items() if all(v == equal[0] for v in equal)}
    return short_labels(
        {
            (recipes[group] if (recipes[group], role) in shared else group, role): value
            for (group, role), value in values.items()
        }
    )


def _join(
    groups: Sequence[Group], points: Mapping[str, Point]
) -> tuple[dict[str, tuple[Point, ...]], dict[str, Point]]:
    """Part the points of a role into curves, by name, and points that are on none, by group."""
    series: dict[str, list[str]] = {}
    for label, name in _curve_names(groups, points).items():
        series.setdefault(name, []).append(label)
    curves, rest = {}, {}
    told = {group.label: tuple(overrides_told(group)) for group in groups}
    for name, labels in series.items():
        places = {points[label].x for label in labels}
        # Groups that only a YAML file tells apart: which of two at one x to join is not known.
        known = len({(points[label].x, told[label]) for label in labels}) == len(labels)
        if len(places) > 1 and known:
            curves[name] = tuple(sorted((points[g] for g in labels), key=lambda p: (p.x, p.y)))
        else:
            rest |= {label: points[label] for label in labels}
    return curves, rest


def _curve_names(groups: Sequence[Group], points: Mapping[str, Point]) -> dict[str, str]:
    """Name each group's curve: the recipe, and what differs between groups of one x.

    A key that moves x by itself is the sweep's own: rounding may give two of its values one x.
    """
    told = {
        group.label: {o.lstrip("~").partition("=")[0]: o for o in overrides_told(group)}
        for group in groups
    }
    moving: set[str] = set()
    beside: set[str] = set()
    for a, b in combinations(groups, 2):
        if a.recipe != b.recipe:
            continue
        one, other = told[a.label], told[b.label]
        differing = {k for k in one.keys() | other.keys() if one.get(k) != other.get(k)}
        if points[a.label].x == points[b.label].x:
            beside |= differing
        elif len(differing) == 1:
            moving |= differing
    return {
        group.label: " ".join(
            [group.recipe, *(o for k, o in told[group.label].items() if k in beside - moving)]
        )
        for group in groups
    }
