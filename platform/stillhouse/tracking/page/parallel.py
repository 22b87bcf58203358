"""The section of parallel coordinates: an axis a varied key, and the results behind them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.tracking.intervals import estimate
from stillhouse.tracking.page import svg
from stillhouse.tracking.page.fronts import COSTS
from stillhouse.tracking.page.html import Markup, element, join, table, unfolded
from stillhouse.tracking.page.names import short_key, short_value
from stillhouse.tracking.page.records import Report, legend, letter, setting
from stillhouse.tracking.report import format_number
from stillhouse.tracking.varied import ABSENT, Varied

MOST_KEYS = 8
WIDTH, HEIGHT = 1080, 330
TOP, BOTTOM, SIDE = 56, 300, 90
LONGEST = 18
APART = 2.4


@dataclass(frozen=True)
class Axis:
    """One axis: a place from 0 (below) to 1 (above) a setting, and what stands at which place."""

    name: str
    shown: tuple[str, ...]
    places: tuple[float | None, ...]
    ticks: tuple[tuple[float, str], ...]
    result: bool = False


def parallel(report: Report) -> Markup:
    """Write the chart, or why there is none."""
    keys = [v for v in report.varied if v.told] or list(report.varied)
    if len(report.groups) < 2:
        return element("p", "One setting alone: no key varies.", class_="missing")
    if not keys:
        return element("p", "No key of the configs varies, or none can be read.", class_="missing")
    axes = [_key_axis(v) for v in keys[:MOST_KEYS]] + _results(report)
    rest = len(keys) - MOST_KEYS
    note = f"{rest} more keys vary; they are in the table of what differs." if rest > 0 else None
    role = report.role()
    return join(
        [
            element(
                "p",
                "A line is a setting: its keys from left to right, and at the right, in bold, the "
                f"mean results of {role}. Point at a line or a name to follow it.",
            ),
            legend(report),
            element(
                "figure",
                _chart(report, axes),
                unfolded("As a table", _table(report, axes)),
                class_="whole",
            ),
            element("p", note, class_="missing") if note else None,
        ]
    )


def _key_axis(varied: Varied) -> Axis:
    name, numbers = varied.key, varied.numbers
    if numbers is not None and all(map(math.isfinite, numbers)):
        return _number_axis(name, varied.values, numbers)
    known = sorted(set(varied.values), key=lambda v: (v != ABSENT, _number(v), v))
    step = 1 / (len(known) - 1)
    place = {value: i * step for i, value in enumerate(known)}
    ticks = tuple((place[value], value) for value in known)
    return Axis(name, varied.values, tuple(place[v] for v in varied.values), ticks)


def _number(value: str) -> float:
    """Order numbers as numbers, and before words."""
    try:
        return float(value)
    except ValueError:
        return math.inf


def _number_axis(
    name: str, shown: Sequence[str], numbers: Sequence[float | None], *, result: bool = False
) -> Axis:
    known = sorted({n for n in numbers if n is not None})
    low, high = known[0], known[-1]
    scale = svg.Scale(low, high, 0, 1, log=low > 0 and high > svg.LOG_SPAN * low)
    values = known if len(known) <= 6 and not result else [low, *scale.ticks(), high]
    ticks: list[tuple[float, str]] = []
    # The ends are told; what would stand on another's number is not.
    for value in [low, high, *values]:
        if all(abs(scale(value) - at) > 0.07 for at, _ in ticks):
            ticks.append((scale(value), _words(value)))
    places = tuple(None if n is None else scale(n) for n in numbers)
    return Axis(name, tuple(shown), places, tuple(ticks), result)


def _words(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= value < 1e5 else svg.short(value, 4)


def _results(report: Report) -> list[Axis]:
    """Return an axis for the quality of the product, and for two of its costs."""
    role = report.role()
    wanted = [report.quality, *(c for c in COSTS if c != report.quality)]
    axes: list[Axis] = []
    for metric in wanted:
        if metric is None or role is None or len(axes) == 3:
            continue
        found = [estimate(list(group.values(role, metric).values())) for group in report.groups]
        means = [e.mean if e is not None and math.isfinite(e.mean) else None for e in found]
        if len({m for m in means if m is not None}) > 1 or (means and metric == report.quality):
            if not any(m is not None for m in means):
                continue
            shown = [ABSENT if m is None else format_number(m) for m in means]
            axes.append(_number_axis(metric, shown, means, result=True))
    return axes


def _chart(report: Report, axes: Sequence[Axis]) -> Markup:
    gap = (WIDTH - 2 * SIDE) / max(1, len(axes) - 1)
    across = [SIDE + i * gap for i in range(len(axes))]
    lines = []
    for g, group in enumerate(report.groups):
        points = [
            (x, BOTTOM - (BOTTOM - TOP) * place + _aside(axis, g))
            for x, axis in zip(across, axes, strict=True)
            if (place := axis.places[g]) is not None
        ]
        lines.append(
            element(
                "g",
                svg.line(points, class_="wide"),
                svg.line(points, stroke_dasharray=svg.dash(g)),
                *(svg.marker(g, x, y, 4) for x, y in points),
                class_=f"mark {svg.look(g)}",
                data_g=str(g),
                data_tip=f"{letter(g)} {group.label}",
            )
        )
    drawn = [_axis(axis, x, i) for i, (x, axis) in enumerate(zip(across, axes, strict=True))]
    return svg.chart(
        *lines,
        *drawn,
        label=f"Parallel coordinates over {', '.join(axis.name for axis in axes)}",
        width=WIDTH,
        height=HEIGHT,
    )


def _aside(axis: Axis, index: int) -> float:
    """Return how far a line is moved, so that settings of one value run beside each other."""
    equal = [i for i, place in enumerate(axis.places) if place == axis.places[index]]
    return APART * (equal.index(index) - (len(equal) - 1) / 2)


def _axis(axis: Axis, x: float, index: int) -> Markup:
    parts = [
        element("title", axis.name),
        element("line", x1=f"{x:.1f}", x2=f"{x:.1f}", y1=f"{TOP}", y2=f"{BOTTOM}"),
        # Names of neighbours stand on two lines in turn.
        svg.text(x, 16 + 18 * (index % 2), _cut(short_key(axis.name), 24), class_="name"),
    ]
    for place, words in axis.ticks:
        y = BOTTOM - (BOTTOM - TOP) * place
        shown = _cut(short_value(words), LONGEST)
        parts.append(svg.text(x + 8, y + 3.5, shown, "start", class_="value"))
    return element("g", *parts, class_="coordinate result" if axis.result else "coordinate")


def _cut(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[: most - 1]}…"


def _table(report: Report, axes: Sequence[Axis]) -> Markup:
    rows = [
        [setting(report, g), *(axis.shown[g] for axis in axes)] for g in range(len(report.groups))
    ]
    return table("Varied keys and results", ["setting", *(a.name for a in axes)], rows)
