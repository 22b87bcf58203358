"""The heat map of runs of blocks: what stands where, and which runs are marked."""

import math
from pathlib import Path
from typing import Any

import pytest

from stillhouse.tracking import block_pictures as module
from stillhouse.tracking.similarity_pictures import plt

OUT = math.nan
DISTANCES = [
    [0.0, 0.3, 0.5, 0.2, 0.7],
    [0.0, 0.2, 0.1, 0.4, OUT],
    [0.0, 0.4, 0.6, OUT, OUT],
    [0.0, 0.1, OUT, OUT, OUT],
]


@pytest.fixture
def figure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The picture of four blocks, before it is written."""
    drawn: list[Any] = []
    monkeypatch.setattr(module, "save", lambda figure, path: drawn.append(figure) or path)
    module.draw_distances(DISTANCES, tmp_path / "distances.png", "12 samples, 340 tokens")
    yield drawn[0]
    plt.close(drawn[0])


def test_a_row_is_a_length_and_a_column_a_first_block(figure) -> None:
    axis, bar = figure.axes
    (image,) = axis.images
    shown = image.get_array().filled(OUT).tolist()
    for length in range(1, 5):
        for start in range(4):
            distance = DISTANCES[start][length]
            assert shown[length - 1][start] == pytest.approx(distance, nan_ok=True)
    # The middle of the pixel of block 0 and length 1 is at (0, 1); short runs are above.
    assert list(image.get_extent()) == [-0.5, 3.5, 4.5, 0.5]
    assert axis.get_ylim() == (4.5, 0.5)
    assert axis.get_title() == "12 samples, 340 tokens"
    assert axis.get_xlabel() == "first block of the run"
    assert axis.get_ylabel() == "blocks in the run (white: the least distant)"
    assert bar.get_ylabel() == "angular distance of its two ends"


def test_the_least_distant_run_of_every_length_is_marked(figure) -> None:
    (marks,) = figure.axes[0].collections
    assert marks.get_offsets().tolist() == [[3, 1], [1, 2], [0, 3], [0, 4]]
    assert marks.get_facecolor().tolist() == [[1.0, 1.0, 1.0, 1.0]]
