"""Pictures of runs, drawn without a display."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from cycler import cycler

from stillhouse.tracking.folding import Band

Curve = tuple[list[int], list[float]]


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


def draw_points(
    points: Mapping[str, tuple[float, float]], x: str, y: str, path: Path, title: str
) -> Path:
    """Draw labelled points, the x-axis logarithmic: quality against size or speed."""
    figure, axis = plt.subplots(figsize=(6, 4.5))
    for label, (horizontal, vertical) in points.items():
        axis.scatter([horizontal], [vertical], s=40)
        place = {"xytext": (6, 4), "textcoords": "offset points", "fontsize": 8}
        axis.annotate(_plain(label), (horizontal, vertical), **place)
    axis.set_xscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.margins(0.15)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A label may reach beyond the axes.
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def _plain(label: str) -> str:
    """Keep matplotlib from reading a label as mathematics."""
    return label.replace("$", r"\$")
