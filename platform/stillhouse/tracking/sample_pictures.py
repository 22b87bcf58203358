"""Pictures of samples: clouds of points, and grids of images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from stillhouse.tracking.similarity_pictures import plt, save

COLUMNS = 4


def draw_points(clouds: Mapping[str, Sequence[Sequence[float]]], path: Path) -> Path:
    """Draw clouds of points in the plane, an axis each, alike in scale.

    Args:
        clouds: row of the table -> points [N][2].
        path: of the PNG.
    """
    lines = -(-len(clouds) // COLUMNS)
    figure, axes = plt.subplots(
        lines,
        COLUMNS,
        figsize=(2.6 * COLUMNS, 2.8 * lines),
        squeeze=False,
        sharex=True,
        sharey=True,
    )
    for axis in axes.flat[len(clouds) :]:
        axis.set_visible(False)
    for axis, (row, cloud) in zip(axes.flat, clouds.items(), strict=False):
        x, y = np.asarray(cloud).T
        axis.scatter(x, y, s=2, alpha=0.4, linewidth=0)
        axis.set_title(row, fontsize=10)
        axis.set_aspect("equal")
    return save(figure, path)


def draw_images(grids: Mapping[str, np.ndarray], path: Path) -> Path:
    """Draw a line of images a row of the table, the same noise above each other.

    Args:
        grids: row -> pixels [N, C, H, W] from 0 to 1; C is 1 or 3.
        path: of the PNG.
    """
    count = len(next(iter(grids.values())))
    figure, axes = plt.subplots(
        len(grids), 1, figsize=(0.55 * count + 1.4, 0.62 * len(grids)), squeeze=False
    )
    for axis, (row, images) in zip(axes.flat, grids.items(), strict=True):
        padded = np.pad(images, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=0.5)
        line = np.concatenate(list(padded.clip(0, 1).transpose(0, 2, 3, 1)), axis=1)
        axis.imshow(line.squeeze(), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        axis.set_ylabel(row, rotation=0, ha="right", va="center", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    return save(figure, path)
