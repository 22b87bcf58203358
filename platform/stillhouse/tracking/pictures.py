"""Pictures of runs, drawn without a display."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

from stillhouse.tracking.folding import SIZE, Band
from stillhouse.tracking.tradeoff import Point, TradeOff

Curve = tuple[list[int], list[float]]
# An axis whose largest value is more than this many times its smallest is logarithmic.
LOG_SPAN = 4


def curves_of(rows: Sequence[tuple[str, int, str, float]]) -> dict[str, dict[str, Curve]]:
    """Turn series rows into metric -> stage -> (steps, values)."""
    curves: dict[str, dict[str, Curve]] = defaultdict(dict)
    for stage, step, metric, value in rows:
        steps, values = curves[metric].setdefault(stage, ([], []))
        steps.append(step)
        values.append(value)
    return dict(curves)


def draw_curves(curves: Mapping[str, Mapping[str, Curve]], path: Path, title: str) -> Path:
    """Draw a panel for the validation metrics and one for the training losses.

    Args:
        curves: metric -> label -> (steps, values).
        path: of the PNG.
        title: above the picture.
    """
    panels = [m for m in ("val_nll", "train_loss") if m in curves]
    panels += [m for m in sorted(curves) if m.startswith("val_") and m not in panels]
    panels = panels or sorted(curves)[:1]
    figure, axes = plt.subplots(1, max(1, len(panels)), figsize=(5.5 * max(1, len(panels)), 4))
    for axis, metric in zip(list(axes) if len(panels) > 1 else [axes], panels, strict=False):
        for label, (steps, values) in curves[metric].items():
            axis.plot(steps, values, label=label, linewidth=1.5)
        axis.set_xlabel("step")
        axis.set_title(metric)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.suptitle(title)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def draw_bands(bands: Mapping[str, Band], metric: str, path: Path, title: str) -> Path:
    """Draw a curve a label, with the range of its repeats behind it."""
    figure, axis = plt.subplots(figsize=(7, 4.5))
    # Forty curves can be told apart before a look comes twice.
    axis.set_prop_cycle(
        cycler(linestyle=["-", "--", ":", "-."]) * cycler(color=mpl.color_sequences["tab10"])
    )
    for label, band in bands.items():
        plain = _plain(label)
        (line,) = axis.plot(band.steps, band.mean, label=plain, linewidth=1.5, marker=".")
        axis.fill_between(
            band.steps, band.low, band.high, color=line.get_color(), alpha=0.15, linewidth=0
        )
    axis.set_xlabel("step")
    axis.set_ylabel(metric)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def draw_trade_off(chart: TradeOff, path: Path) -> Path:
    """Draw a sweep's curves, labelled points and levels, the deviations over seeds as bars."""
    figure, axis = plt.subplots(figsize=(6, 4.5))
    # Lines are whole here, a level's dashes apart: markers tell the curves of one colour apart.
    axis.set_prop_cycle(
        cycler(marker=["o", "s", "^", "D"]) * cycler(color=mpl.color_sequences["tab10"])
    )
    for label, curve in chart.curves.items():
        _draw_marks(axis, curve, label=_plain(label), linewidth=1.5, markersize=5)
    for label, point in chart.points.items():
        _draw_marks(axis, [point], linestyle="none", markersize=6)
        place = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
        axis.annotate(_plain(label), (point.x, point.y), **place)
    greys = cycle(("0.3", "0.55", "0.75"))
    for (label, level), grey in zip(chart.levels.items(), greys, strict=False):
        axis.axhline(level, label=_plain(label), color=grey, linestyle="--", linewidth=1.2)
    marks = [*chart.points.values(), *chain.from_iterable(chart.curves.values())]
    _scale(axis, chart.x, [p.x for p in marks])
    axis.set_xlabel(chart.x)
    axis.set_ylabel(chart.y)
    axis.set_title(f"{chart.y} against {chart.x}")
    axis.grid(alpha=0.3)
    # A label stands to the right of its point.
    axis.margins(0.15 if chart.points else 0.06)
    if chart.curves:
        axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A label may reach beyond the axes.
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def _draw_marks(axis: Axes, points: Sequence[Point], **style: Any) -> None:
    axis.errorbar(
        [p.x for p in points],
        [p.y for p in points],
        xerr=[p.x_sd for p in points] if any(p.x_sd for p in points) else None,
        yerr=[p.y_sd for p in points] if any(p.y_sd for p in points) else None,
        elinewidth=1,
        capsize=2.5,
        **style,
    )


def _scale(axis: Axes, metric: str, values: Sequence[float]) -> None:
    """Sizes are read by their ratios, and so is what spans many; a share of 1 never is."""
    low, high = min(values), max(values)
    wide = low > 0 and high > LOG_SPAN * low
    if (wide and high > 1) or (low > 0 and metric == SIZE):
        axis.set_xscale("log")
        # Powers of ten alone leave less than a decade without a number to read.
        steps = (1, 2, 5) if high < 100 * low else (1,)
        narrow = MaxNLocator(5, steps=[1, 2, 5, 10])
        axis.xaxis.set_major_locator(LogLocator(subs=steps) if wide else narrow)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.xaxis.set_minor_locator(NullLocator())


def _plain(label: str) -> str:
    """Keep matplotlib from reading a label as mathematics."""
    return label.replace("$", r"\$")
