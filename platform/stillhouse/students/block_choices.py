"""Which blocks to leave out of a model, by what was measured of them.

Siblings with one signature: from the scores of a model's blocks to those that go, in rising order.
One block at least stays. Blocks are counted from 0.
"""

from collections.abc import Sequence

import torch

from stillhouse.errors import UserError
from stillhouse.ranges import Count
from stillhouse.records.block_scores import BlockScores

KEY = "stages.<stage>.choose"


def least_distant(scores: BlockScores, *, n: Count) -> Sequence[int]:
    """Choose the run of blocks whose two ends point most nearly the same way: argmin_l d(l, n).

    Args:
        scores: of the model's blocks.
        n: blocks that go; of equally distant runs the first one does.

    Raises:
        UserError: for less than one block, or for all of them.
    """
    _check_number(n, scores)
    start = scores.least_distant(n)
    return list(range(start, start + n))


def least_influential(scores: BlockScores, *, n: Count) -> Sequence[int]:
    """Choose the blocks of the lowest Block Influence, wherever they stand.

    Args:
        scores: of the model's blocks.
        n: blocks that go; of equally influential ones the first ones do.

    Raises:
        UserError: as `least_distant`.
    """
    _check_number(n, scores)
    return _lowest(scores.influences, n)


def least_magnitude(scores: BlockScores, *, n: Count) -> Sequence[int]:
    """Choose the blocks of the smallest weights: a baseline that sees no data.

    Args:
        scores: of the model's blocks.
        n: blocks that go; of equally small ones the first ones do.

    Raises:
        UserError: as `least_distant`.
    """
    _check_number(n, scores)
    return _lowest(scores.magnitudes, n)


def random_run(scores: BlockScores, *, n: Count, seed: int) -> Sequence[int]:
    """Draw a run of blocks: the baseline that a distance must beat.

    Every run of its length is as likely as any other, but for the least distant one: that is drawn
    only where there is no further one.

    Args:
        scores: of the model's blocks; they only say which run is not drawn.
        n: blocks that go.
        seed: of the draw, which has a generator of its own.

    Raises:
        UserError: as `least_distant`.
    """
    _check_number(n, scores)
    best = scores.least_distant(n)
    starts = [start for start in range(scores.blocks - n + 1) if start != best] or [best]
    drawn = torch.randint(len(starts), (), generator=torch.Generator().manual_seed(seed))
    start = starts[int(drawn)]
    return list(range(start, start + n))


def given(scores: BlockScores, *, blocks: list[int]) -> Sequence[int]:
    """Take the blocks that are given.

    Args:
        scores: of the model's blocks; only their number counts here.
        blocks: those that go, in any order.

    Raises:
        UserError: for none, all or what is no number, for a block that is not there, and for one
            that stands twice.
    """
    chosen = list(blocks)
    if not chosen or not all(type(block) is int for block in chosen):
        raise UserError(
            f"{KEY}.blocks={chosen}: expected one number or more of blocks, counted from 0"
        )
    wrong = [block for block in chosen if not 0 <= block < scores.blocks]
    if wrong:
        raise UserError(
            f"{KEY}.blocks={chosen}: there is no block {wrong[0]}; the model has the blocks 0 to "
            f"{scores.blocks - 1}"
        )
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{KEY}.blocks={chosen}: a block stands twice; expected each once")
    if len(chosen) == scores.blocks:
        raise UserError(
            f"{KEY}.blocks={chosen}: these are all blocks of the model; leave one out at least"
        )
    return sorted(chosen)


def _check_number(n: Count, scores: BlockScores) -> None:
    if scores.blocks < 2:
        raise UserError(
            f"{KEY}.n={n}: the model has one block, and one must stay; take a deeper one"
        )
    if type(n) is not int or not 1 <= n < scores.blocks:
        raise UserError(
            f"{KEY}.n={n}: expected a number of blocks from 1 to {scores.blocks - 1}, for the "
            f"model has {scores.blocks} and one must stay"
        )


def _lowest(values: Sequence[float], n: Count) -> list[int]:
    """Return the places of the n lowest values in rising order, the first of equal ones."""
    return sorted(sorted(range(len(values)), key=lambda place: values[place])[:n])
