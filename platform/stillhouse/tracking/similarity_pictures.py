"""Pictures of how alike a model's layers attend, and of which of them share."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

# Layers that are numbered one by one; of more, every second or fifth is.
EVERY_LAYER = 24
EVERY_SECOND = 48


def draw_similarity(
    similarity: Sequence[Sequence[float]],
    path: Path,
    title: str,
    *,
    groups: Mapping[int, Sequence[int]] | None = None,
) -> Path:
    """Draw the similarity of every pair of layers as a heat map.

    Args:
        similarity: [L, L], symmetric, its diagonal 1.
        path: of the PNG.
        title: above the picture.
        groups: leader -> its followers, rising; each is framed.
    """
    layers = len(similarity)
    figure, axis = plt.subplots(figsize=(6.5, 5.5))
    # The diagonal says nothing, and would squeeze the colours of what does.
    pairs = [[math.nan if i == j else s for j, s in enumerate(r)] for i, r in enumerate(similarity)]
    image = axis.imshow(pairs, cmap="viridis")
    axis.set_facecolor("0.85")
    bar = figure.colorbar(image, ax=axis, label="mean cosine of attention matrices")
    bar.ax.tick_params(labelsize=8)
    for leader, followers in (groups or {}).items():
        side = followers[-1] - leader + 1
        frame = Rectangle((leader - 0.5, leader - 0.5), side, side, fill=False)
        frame.set(edgecolor="tab:red", linewidth=2.5, zorder=3, clip_on=False)
        axis.add_patch(frame)
    for one in (axis.xaxis, axis.yaxis):
        number_layers(one, layers)
    axis.set_xlabel("layer")
    axis.set_ylabel("layer")
    axis.set_title(title)
    return save(figure, path)


def draw_scores(scores: Sequence[float], cut: float | None, path: Path, title: str) -> Path:
    """Draw the mean similarity of each layer to the others, those above the cut in colour.

    Args:
        scores: [L].
        cut: in the largest gap between sorted scores; None where there is none.
        path: of the PNG.
        title: above the picture.
    """
    figure, axis = plt.subplots(figsize=(7, 4))
    above = [cut is None or score > cut for score in scores]
    axis.plot(range(len(scores)), scores, color="0.8", linewidth=1, zorder=1)
    for kept, color, label in ((True, "tab:blue", "above the cut"), (False, "0.5", "below it")):
        layers = [layer for layer, is_above in enumerate(above) if is_above is kept]
        named = label if cut is not None else None
        axis.scatter(layers, [scores[i] for i in layers], color=color, label=named, zorder=2)
    if cut is not None:
        axis.axhline(cut, color="tab:red", linestyle="--", linewidth=1, label=f"cut at {cut:.3f}")
        axis.legend(frameon=False, fontsize=8)
    number_layers(axis.xaxis, len(scores))
    axis.set_xlabel("layer")
    axis.set_ylabel("mean similarity to the other layers")
    axis.set_title(title)
    axis.grid(alpha=0.3)
    return save(figure, path)


def number_layers(axis: Any, layers: int) -> None:
    """Put numbers of layers, as many as there is room for, to an axis."""
    step = 1 if layers <= EVERY_LAYER else 2 if layers <= EVERY_SECOND else 5
    axis.set_ticks(range(0, layers, step))
    axis.set_tick_params(labelsize=8 if layers <= EVERY_LAYER else 7)


def save(figure: Any, path: Path) -> Path:
    """Write a figure as a PNG and close it."""
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
