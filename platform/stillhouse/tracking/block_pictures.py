"""A picture of how far the runs of a model's blocks turn the residual stream."""

from collections.abc import Sequence
from pathlib import Path

from stillhouse.tracking.similarity_pictures import number_layers, plt, save


def draw_distances(distances: Sequence[Sequence[float]], path: Path, title: str) -> Path:
    """Draw the angular distance of every run as a heat map, start by length.

    Args:
        distances: [L, L + 1] by first block and length, NaN where there is no such run; the first
            one of the least distant runs of each length is marked.
        path: of the PNG.
        title: above the picture.
    """
    blocks = len(distances)
    by_length = [[row[length] for row in distances] for length in range(1, blocks + 1)]
    figure, axis = plt.subplots(figsize=(6.5, 5.5))
    image = axis.imshow(by_length, cmap="viridis", extent=(-0.5, blocks - 0.5, blocks + 0.5, 0.5))
    axis.set_facecolor("0.85")
    bar = figure.colorbar(image, ax=axis, label="angular distance of its two ends")
    bar.ax.tick_params(labelsize=8)
    runs = [row[: blocks - place] for place, row in enumerate(by_length)]
    starts = [run.index(min(run)) for run in runs]
    axis.scatter(
        starts, range(1, blocks + 1), s=14, color="white", edgecolor="black", linewidth=0.6
    )
    number_layers(axis.xaxis, blocks)
    number_layers(axis.yaxis, blocks + 1)
    axis.set_ylim(blocks + 0.5, 0.5)
    axis.set_xlabel("first block of the run")
    axis.set_ylabel("blocks in the run (white: the least distant)")
    axis.set_title(title)
    return save(figure, path)
