"""The section of learning curves: a panel a stage and metric, a line a setting."""

import math
from collections.abc import Mapping, Sequence

from stillhouse.tracking.folding import Band, fold_curves
from stillhouse.tracking.page import svg
from stillhouse.tracking.page.html import Markup, element, join, table, unfolded
from stillhouse.tracking.page.records import Report, legend, setting
from stillhouse.tracking.report import format_number

# A curve of more steps is drawn by the means, lowest and highest of bins.
MOST_POINTS = 120
MOST_PANELS = 40
SHARED = -1


def curves(report: Report) -> Markup:
    """Write the panels: validation first, then losses; other series of training are folded away."""
    panels, notes = _panels(report)
    if not panels:
        return element("p", "No run has a metrics.csv with a series to draw.", class_="missing")
    first = [p for p in panels if p[0].startswith("val_") or p[0] == "train_loss"]
    first.sort(key=lambda p: not p[0].startswith("val_"))
    rest = [p for p in panels if p not in first]
    left_out = len(first[MOST_PANELS:]) + len(rest[MOST_PANELS:])
    if left_out:
        notes.append(f"{left_out} more panels are left out.")
    shared = any(SHARED in lines for _, _, lines in panels)
    drawn = element("div", *(_panel(report, *p) for p in first[:MOST_PANELS]), class_="panels")
    more = element("div", *(_panel(report, *p) for p in rest[:MOST_PANELS]), class_="panels")
    return join(
        [
            element(
                "p",
                "A line is the mean over seeds, the band their range, at the steps that all have. "
                f"Of more than {MOST_POINTS} steps the means of neighbours are drawn.",
            ),
            legend(report, shared=shared),
            drawn,
            unfolded("Other series of training", more) if rest else None,
            element("p", " ".join(notes), class_="missing") if notes else None,
        ]
    )


def _panels(report: Report) -> tuple[list[tuple[str, str, dict[int, Band]]], list[str]]:
    """Return (metric, stage, setting -> band), and notes on what cannot be drawn."""
    metrics = dict.fromkeys(row[2] for run in report.runs for row in run.series)
    place = {group.label: i for i, group in enumerate(report.groups)}
    panels, broken = [], 0
    for metric in metrics:
        stages: dict[str, dict[int, Band]] = {}
        for (label, stage), band in fold_curves(report.groups, metric).items():
            kept = _finite(band)
            broken += len(band.steps) - len(kept.steps)
            if kept.steps:
                stages.setdefault(stage, {})[place[label]] = thin(kept)
        for stage, lines in stages.items():
            bands = list(lines.values())
            alike = len(bands) > 1 and all(_alike(band, bands[0]) for band in bands)
            panels.append((metric, stage, {SHARED: bands[0]} if alike else lines))
    notes = [f"{broken} means of curves are no finite numbers and not drawn."] if broken else []
    return panels, notes


def _alike(a: Band, b: Band) -> bool:
    """Whether two curves are one; means of equal numbers may differ by rounding."""
    return a.steps == b.steps and all(
        math.isclose(one, other, rel_tol=1e-9)
        for line, against in ((a.mean, b.mean), (a.low, b.low), (a.high, b.high))
        for one, other in zip(line, against, strict=True)
    )


def _finite(band: Band) -> Band:
    rows = zip(band.steps, band.mean, band.low, band.high, strict=True)
    return _band([row for row in rows if all(map(math.isfinite, row))])


def _band(rows: Sequence[tuple[int, float, float, float]]) -> Band:
    steps, mean, low, high = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Band(tuple(steps), tuple(mean), tuple(low), tuple(high))


def thin(band: Band, most: int = MOST_POINTS) -> Band:
    """Fold neighbouring steps into bins, so that no more than `most` are left."""
    size = -(-len(band.steps) // most)
    if size <= 1:
        return band
    rows = []
    for start in range(0, len(band.steps), size):
        part = slice(start, start + size)
        means, steps = band.mean[part], band.steps[part]
        rows.append(
            (
                steps[len(steps) // 2],
                sum(means) / len(means),
                min(band.low[part]),
                max(band.high[part]),
            )
        )
    return _band(rows)


def _panel(report: Report, metric: str, stage: str, lines: Mapping[int, Band]) -> Markup:
    steps = [s for band in lines.values() for s in band.steps]
    # Means alone decide the axis: a repeat's single leap would flatten every line.
    values = [v for band in lines.values() for v in band.mean]
    x = svg.Scale(0, max(1, *steps), svg.LEFT, svg.WIDTH - svg.RIGHT, whole=True)
    y = svg.scale(values, svg.HEIGHT - svg.BOTTOM, svg.TOP)
    marks = [_line(index, band, x, y) for index, band in lines.items()]
    name = f"{metric} of the stage {stage}"
    return element(
        "figure",
        element("figcaption", element("b", metric), f" · {stage}"),
        svg.chart(
            svg.axes(x, y, "step" + (" (vertical axis: log)" if y.log else "")), *marks, label=name
        ),
        unfolded("As a table", _table(report, name, lines)),
    )


def _line(index: int, band: Band, x: svg.Scale, y: svg.Scale) -> Markup:
    places = [(x(s), y(v)) for s, v in zip(band.steps, band.mean, strict=True)]
    low, high = min(y.low, y.high), max(y.low, y.high)
    edge = [
        (x(s), y(min(max(v, low), high)))
        for s, v in [
            *zip(band.steps, band.high, strict=True),
            *reversed(list(zip(band.steps, band.low, strict=True))),
        ]
    ]
    shared = index == SHARED
    few = len(places) <= 12
    return element(
        "g",
        svg.area(edge, class_="band") if band.low != band.high else None,
        svg.line(places, stroke_dasharray=None if shared else svg.dash(index)),
        *(svg.marker(0 if shared else index, px, py, 2.6) for px, py in places if few),
        class_="shared" if shared else svg.look(index),
        data_g=None if shared else str(index),
    )


def _table(report: Report, name: str, lines: Mapping[int, Band]) -> Markup:
    rows = [
        [
            "all settings" if i == SHARED else setting(report, i),
            f"{band.steps[0]:,} to {band.steps[-1]:,}",
            *map(format_number, (band.mean[0], band.mean[-1], min(band.mean), max(band.mean))),
        ]
        for i, band in lines.items()
    ]
    return table(name, ["setting", "steps", "first", "last", "lowest", "highest"], rows)
