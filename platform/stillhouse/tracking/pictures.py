"""Pictures of runs, drawn without a display."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

Curve = tuple[list[int], list[float]]
SKIPPED = ("learning_rate",)


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


def draw_points(
    points: Mapping[str, tuple[float, float]], x: str, y: str, path: Path, title: str
) -> Path:
    """Draw labelled points, the x-axis logarithmic: quality against size or speed."""
    figure, axis = plt.subplots(figsize=(6, 4.5))
    for label, (horizontal, vertical) in points.items():
        axis.scatter([horizontal], [vertical], s=40)
        axis.annotate(label, (horizontal, vertical), (6, 4), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.set_title(title)
    axis.grid(alpha=0.3)
    axis.margins(0.15)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
