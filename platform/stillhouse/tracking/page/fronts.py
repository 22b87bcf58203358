"""The section of trade-offs: quality against what a model costs, with the Pareto front."""

from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.tracking.directions import front, sign_of
from stillhouse.tracking.folding import known_metrics
from stillhouse.tracking.page import svg
from stillhouse.tracking.page.html import Markup, element, join, table, unfolded
from stillhouse.tracking.page.records import Report, legend, letter, setting
from stillhouse.tracking.report import format_number
from stillhouse.tracking.tradeoff import Point, fold_points

# Metrics that a model costs; each that a run has is an axis of its own.
COSTS = ("parameters", "latency_ms", "latency_ms_1", "decode_tokens_per_s", "peak_memory_mb")
COSTS += ("network_calls",)
# What the issue of a page asks for: said to be missing where no run has it.
WANTED = {"parameters": ("parameters",), "latency": COSTS[1:4], "memory": ("peak_memory_mb",)}
WIDTH, HEIGHT = 560, 340
LETTER_WIDTH = 5.8


@dataclass(frozen=True)
class Mark:
    """A model in a chart: a role of a setting, or of all settings where they agree."""

    index: int | None
    role: str
    point: Point

    @property
    def name(self) -> str:
        """What is written beside it."""
        return self.role if self.index is None else f"{letter(self.index)} {self.role}"


def fronts(report: Report) -> Markup:
    """Write a chart a cost, and say which costs no run has measured."""
    if report.quality is None:
        return element("p", "No metric of quality: name one with y=<metric>.", class_="missing")
    known = known_metrics(report.groups)
    costs = [c for c in dict.fromkeys([*COSTS, report.x]) if c in known and c != report.quality]
    parts, notes = [], []
    for cost in costs:
        marks = marks_of(report, cost, report.quality)
        places = {mark.point.x for mark in marks}
        if len(places) > 1:
            parts.append(_chart(report, cost, report.quality, marks))
        elif places:
            notes.append(
                f"Every model has {cost} {format_number(places.pop())}: there is no trade-off."
            )
        else:
            notes.append(f"No model has both {cost} and {report.quality}.")
    absent = [name for name, metrics in WANTED.items() if not set(metrics) & set(known)]
    notes += [f"No run has measured {name}." for name in absent]
    return join(
        [
            element(
                "p",
                f"A mark is a role of a setting, the means of {report.quality} and of a cost over "
                "its seeds; whiskers are sample deviations. The dashed line joins the models that "
                "none betters in both; their names are written beside them.",
            ),
            legend(report, shared=True) if parts else None,
            element("div", *parts, class_="panels wide") if parts else None,
            element("p", " ".join(notes), class_="missing") if notes else None,
        ]
    )


def marks_of(report: Report, x: str, y: str) -> list[Mark]:
    """Return the models that have both metrics; one that all settings share is there once."""
    points, _ = fold_points(report.groups, x, y)
    place = {group.label: i for i, group in enumerate(report.groups)}
    marks = []
    for role, found in points.items():
        alike = len(found) > 1 and len(set(found.values())) == 1
        kept = (
            [(None, next(iter(found.values())))]
            if alike
            else [(place[label], point) for label, point in found.items()]
        )
        marks += [Mark(index, role, point) for index, point in kept]
    return marks


def _chart(report: Report, x_name: str, y_name: str, marks: Sequence[Mark]) -> Markup:
    points = [mark.point for mark in marks]
    x = svg.scale([p.x for p in points], svg.LEFT, WIDTH - svg.RIGHT)
    y = svg.scale([p.y for p in points], HEIGHT - svg.BOTTOM, svg.TOP + 14)
    signs = sign_of(x_name), sign_of(y_name)
    best: list[int] = []
    if signs[0] is not None and signs[1] is not None:
        best = front([(p.x, p.y) for p in points], signs[0], signs[1])
    places = [(x(p.x), y(p.y)) for p in points]
    title = f"{y_name} against {x_name}"
    joined = svg.line([places[i] for i in best], class_="front") if len(best) > 1 else None
    unknown = [n for n, s in zip((x_name, y_name), signs, strict=True) if s is None]
    told = f"No front: the name {unknown[0]} does not say which way is better." if unknown else None
    return element(
        "figure",
        element("figcaption", element("b", y_name), f" against {x_name}"),
        svg.chart(
            svg.axes(x, y, x_name, y_name),
            joined,
            *(_mark(m, i in best, x, y, (x_name, y_name)) for i, m in enumerate(marks)),
            *_names(marks, places, best),
            label=f"{title}; on the front: {', '.join(marks[i].name for i in best) or 'not known'}",
            width=WIDTH,
            height=HEIGHT,
        ),
        element("p", told, class_="missing") if told else None,
        unfolded("As a table", _table(report, x_name, y_name, marks, best)),
    )


def _mark(mark: Mark, best: bool, x: svg.Scale, y: svg.Scale, names: tuple[str, str]) -> Markup:
    p = mark.point
    tip = f"{mark.name}: {names[1]} {format_number(p.y)}, {names[0]} {format_number(p.x)}"
    look = "shared" if mark.index is None else svg.look(mark.index)
    return element(
        "g",
        _whisker(x, p.x, p.x_sd, y(p.y), True),
        _whisker(y, p.y, p.y_sd, x(p.x), False),
        svg.marker(mark.index or 0, x(p.x), y(p.y), 5 if best else 4),
        class_=f"mark {look}" if best else f"mark {look} behind",
        data_g=None if mark.index is None else str(mark.index),
        data_tip=tip,
    )


def _whisker(scale: svg.Scale, value: float, sd: float, across: float, flat: bool) -> Markup | None:
    if not sd:
        return None
    # A deviation may reach beyond zero, where a logarithm has no place.
    low, high = max(value - sd, scale.low), min(value + sd, scale.high)
    a, b = scale(low), scale(high)
    ends = [(a, across), (b, across)] if flat else [(across, a), (across, b)]
    return svg.line(ends, class_="whisker")


def _names(
    marks: Sequence[Mark], places: Sequence[tuple[float, float]], best: Sequence[int]
) -> list[Markup]:
    """Write the names of the models on the front where there is room beside them."""
    taken = [(px - 5, py - 5, px + 5, py + 5) for px, py in places]
    written = []
    for i in best:
        px, py = places[i]
        wide = LETTER_WIDTH * len(marks[i].name)
        for left, top, anchor in (
            (px + 8, py - 6, "start"),
            (px - 8 - wide, py - 6, "end"),
            (px - wide / 2, py - 21, "middle"),
            (px - wide / 2, py + 9, "middle"),
            (px + 6, py - 18, "start"),
            (px - 6 - wide, py + 6, "end"),
        ):
            box = (left, top, left + wide, top + 12)
            inside = box[0] > svg.LEFT and box[2] < WIDTH and box[3] < HEIGHT - svg.BOTTOM
            if inside and not any(_overlap(box, other) for other in taken):
                taken.append(box)
                at = {"start": left, "end": left + wide, "middle": px}[anchor]
                written.append(svg.text(at, top + 9.5, marks[i].name, anchor, class_="label"))
                break
    return written


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _table(report: Report, x: str, y: str, marks: Sequence[Mark], best: Sequence[int]) -> Markup:
    order = sorted(range(len(marks)), key=lambda i: (marks[i].point.x, marks[i].point.y))
    rows = [
        [
            "all settings" if marks[i].index is None else setting(report, marks[i].index or 0),
            marks[i].role,
            format_number(marks[i].point.x),
            format_number(marks[i].point.y),
            "on the front" if i in best else "",
        ]
        for i in order
    ]
    return table(f"{y} against {x}", ["setting", "role", x, y, "front"], rows, headers=2)
