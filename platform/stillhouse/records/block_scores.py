"""What the blocks of a model do to the residual stream, as a record and a JSON artifact."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import write_json

BLOCK_SCORES = "block_scores.json"


@dataclass(frozen=True)
class BlockScores:
    """How little a model's blocks turn what they are given, and how large their weights are.

    Attributes:
        distances: [L, L + 1], d(l, n): the angular distance between what block l is given and what
            block l + n - 1 hands on, from 0 to 1, d(l, 0) = 0; NaN where the run l..l+n-1 reaches
            beyond the last block.
        influences: [L], Block Influence: 1 - the cosine of what a block is given and hands on.
        magnitudes: [L], the root mean square of a block's weights.
        samples: that distances and influences are the mean over.
        tokens: in all of these.
    """

    distances: Float[Tensor, "L lengths"]
    influences: tuple[float, ...]
    magnitudes: tuple[float, ...]
    samples: int
    tokens: int

    @property
    def blocks(self) -> int:
        """L."""
        return len(self.distances)

    def of_length(self, length: int) -> list[float]:
        """Return the distances of the runs of so many blocks, by their first block."""
        return self.distances[: self.blocks - length + 1, length].tolist()

    def least_distant(self, length: int) -> int:
        """Return where the least distant run of so many blocks starts, the first of equal ones."""
        distances = self.of_length(length)
        return distances.index(min(distances))

    def of_run(self, blocks: Sequence[int]) -> float | None:
        """Return the distance of rising blocks; None where they are no run."""
        run = range(blocks[0], blocks[0] + len(blocks))
        return float(self.distances[run.start, len(run)]) if list(blocks) == list(run) else None


def write_block_scores(scores: BlockScores, folder: Path) -> None:
    """Write what was measured where the choice of blocks reads it."""
    runs = [row[: scores.blocks - start + 1] for start, row in enumerate(scores.distances.tolist())]
    content = {
        "blocks": scores.blocks,
        "samples": scores.samples,
        "tokens": scores.tokens,
        "distances": runs,
        "influences": scores.influences,
        "magnitudes": scores.magnitudes,
    }
    write_json(folder / BLOCK_SCORES, content)


def read_block_scores(path: str, *, key: str) -> BlockScores:
    """Read what `write_block_scores` wrote.

    Args:
        path: the folder.
        key: of the path, for messages.

    Raises:
        UserError: where there is no such file, or it holds something else.
    """
    try:
        content = json.loads((Path(path) / BLOCK_SCORES).read_text())
        runs = [[float(distance) for distance in row] for row in content["distances"]]
        influences, magnitudes = (
            tuple(map(float, content[name])) for name in ("influences", "magnitudes")
        )
        samples, tokens = int(content["samples"]), int(content["tokens"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{key}={path}: no scores of blocks can be read from {BLOCK_SCORES}; expected what the "
            "stage `score_blocks` wrote"
        ) from error
    blocks = len(runs)
    lengths = [len(row) for row in runs]
    if not blocks or lengths != list(range(blocks + 1, 1, -1)):
        raise UserError(
            f"{key}={path}: {BLOCK_SCORES} holds {lengths} distances; expected one of every run "
            "from every block, no block to all that follow; run the stage `score_blocks` anew"
        )
    if {len(influences), len(magnitudes)} != {blocks}:
        raise UserError(
            f"{key}={path}: {BLOCK_SCORES} holds {len(influences)} influences and "
            f"{len(magnitudes)} magnitudes of {blocks} blocks; run the stage `score_blocks` anew"
        )
    if not all(0 <= distance <= 1 for row in runs for distance in row):
        raise UserError(
            f"{key}={path}: {BLOCK_SCORES} holds distances outside [0, 1]; run the stage "
            "`score_blocks` anew"
        )
    filled = [row + [math.nan] * start for start, row in enumerate(runs)]
    distances = torch.tensor(filled, dtype=torch.float64)
    return BlockScores(distances, influences, magnitudes, samples, tokens)
