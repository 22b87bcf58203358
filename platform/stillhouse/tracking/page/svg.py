"""Charts as inline SVG: scales, axes and marks; colours and letters come from the style sheet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from stillhouse.tracking.page.html import Markup, element, join

WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 14, 38
# What spans more than this many times its smallest value is read by its ratios.
LOG_SPAN = 8
# Dashes and markers repeat after other numbers than the seven colours do.
DASHES = ("", "7 3", "2 2.5", "9 3 2 3")
COLOURS = 7
MARKERS = 5


@dataclass(frozen=True)
class Scale:
    """A map from values to places.

    Attributes:
        low: value at the place `start`.
        high: value at the place `end`.
        start: place.
        end: place.
        log: whether equal ratios take equal room.
        whole: whether there is nothing between whole numbers.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False

    def __call__(self, value: float) -> float:
        """Return the place of a value."""
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return about five round values within."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                values = [step * 10.0**d for d in decades for step in steps]
                inside = [v for v in values if self.low * 0.999 <= v <= self.high * 1.001]
                if len(inside) >= 3:
                    return inside[:: -(-len(inside) // 7)]
            # Less than a decade: round values as on a linear axis.
        rough = (self.high - self.low) / 6
        if rough <= 0:
            return [self.low]
        power = 10.0 ** math.floor(math.log10(rough))
        step = (
            1.0
            if self.whole and rough < 1
            else next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
        )
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def scale(values: Sequence[float], start: float, end: float, *, share: bool = False) -> Scale:
    """Return a scale with a little room around the values.

    Args:
        values: finite, one at least.
        start: place of the low end.
        end: place of the high end.
        share: whether values are parts of 1, which are never logarithmic.
    """
    low, high = min(values), max(values)
    log = not share and low > 0 and high > LOG_SPAN * low
    if log:
        room = (high / low) ** 0.06
        return Scale(low / room, high * room, start, end, log=True)
    room = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return Scale(low - room, high + room, start, end)


def short(value: float, digits: int = 3) -> str:
    """Show a number on an axis."""
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def distinct(values: Sequence[float]) -> list[tuple[float, str]]:
    """Return values and their texts, with as many digits as tell them apart."""
    texts: list[str] = []
    for digits in range(3, 8):
        texts = [short(value, digits) for value in values]
        exact = all(math.isclose(float(f"{v:.{digits}g}"), v, rel_tol=1e-6) for v in values)
        if exact and len(set(texts)) == len(texts):
            break
    return list(zip(values, texts, strict=True))


def look(index: int) -> str:
    """Return the classes of the index-th setting; dashes and colours change together."""
    return f"c{index % COLOURS}"


def dash(index: int) -> str | None:
    """Return the dashes of the index-th setting's lines; None for a whole line."""
    return DASHES[index % len(DASHES)] or None


def chart(*marks: object, label: str, width: float = WIDTH, height: float = HEIGHT) -> Markup:
    """Write a chart; `label` is read out instead of it."""
    return element(
        "svg",
        *marks,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=label,
        class_="chart",
    )


def axes(x: Scale, y: Scale, x_label: str, y_label: str = "") -> Markup:
    """Write the lines, the numbers and the names of two axes."""
    parts = []
    for value, words in distinct(y.ticks()):
        at = f"{y(value):.1f}"
        parts.append(element("line", x1=f"{x.start:g}", x2=f"{x.end:g}", y1=at, y2=at))
        parts.append(text(x.start - 6, y(value) + 3.5, words, anchor="end"))
    for value, words in distinct(x.ticks()):
        at = f"{x(value):.1f}"
        parts.append(element("line", x1=at, x2=at, y1=f"{y.start:g}", y2=f"{y.start + 4:g}"))
        parts.append(text(x(value), y.start + 16, words))
    middle = (x.start + x.end) / 2
    parts.append(text(middle, y.start + 32, x_label + (", log" if x.log else ""), class_="name"))
    if y_label:
        parts.append(
            text(x.start, y.end - 8, y_label + (", log" if y.log else ""), "start", class_="name")
        )
    return element("g", *parts, class_="axes")


def text(x: float, y: float, words: object, anchor: str = "middle", **more: object) -> Markup:
    """Write text at a place."""
    return element("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **more)


def line(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """Write a line through places."""
    return element("polyline", points=_places(points), fill="none", **attributes)


def area(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """Write an area between places."""
    return element("polygon", points=_places(points), **attributes)


def marker(index: int, x: float, y: float, size: float = 4.5, **attributes: object) -> Markup:
    """Write the index-th marker: circle, square, triangle, diamond, downward triangle."""
    s = size
    outlines = (
        f"m{-s:g},0a{s:g},{s:g} 0 1,0 {2 * s:g},0a{s:g},{s:g} 0 1,0 {-2 * s:g},0z",
        f"m{-s * 0.9:g},{-s * 0.9:g}h{s * 1.8:g}v{s * 1.8:g}h{-s * 1.8:g}z",
        f"m0,{-s * 1.2:g}l{s * 1.15:g},{s * 2:g}h{-s * 2.3:g}z",
        f"m0,{-s * 1.3:g}l{s * 1.2:g},{s * 1.3:g}l{-s * 1.2:g},{s * 1.3:g}"
        f"l{-s * 1.2:g},{-s * 1.3:g}z",
        f"m0,{s * 1.2:g}l{s * 1.15:g},{-s * 2:g}h{-s * 2.3:g}z",
    )
    return element("path", d=f"M{x:.1f},{y:.1f}{outlines[index % MARKERS]}", **attributes)


def _places(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def swatch(index: int | None) -> Markup:
    """Write a setting's line and marker as a key; None is what all settings share."""
    marks = join(
        [
            line([(1, 7), (27, 7)], stroke_dasharray=None if index is None else dash(index)),
            None if index is None else marker(index, 14, 7, 3.8),
        ]
    )
    look_ = "shared" if index is None else look(index)
    return element("svg", marks, viewBox="0 0 28 14", class_=f"swatch {look_}", aria_hidden="true")
