"""Choices of blocks against hand-made scores: which go, and what is refused."""

import math
from collections import Counter

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.records.block_scores import BlockScores
from stillhouse.students.block_choices import (
    given,
    least_distant,
    least_influential,
    least_magnitude,
    random_run,
)

OUT = math.nan
# Of two blocks 1 and 2 turn least, of one and of three other ones do.
DISTANCES = [
    [0.0, 0.3, 0.5, 0.2, 0.7],
    [0.0, 0.2, 0.1, 0.4, OUT],
    [0.0, 0.4, 0.6, OUT, OUT],
    [0.0, 0.1, OUT, OUT, OUT],
]


def scores(distances: list[list[float]] = DISTANCES) -> BlockScores:
    return BlockScores(
        distances=torch.tensor(distances, dtype=torch.float64),
        influences=(0.2, 0.1, 0.4, 0.1)[: len(distances)],
        magnitudes=(3.0, 4.0, 1.0, 2.0)[: len(distances)],
        samples=1,
        tokens=1,
    )


@pytest.mark.parametrize(("n", "expected"), [(1, [3]), (2, [1, 2]), (3, [0, 1, 2])])
def test_the_least_distant_run(n, expected):
    assert least_distant(scores(), n=n) == expected


def test_the_distances_of_a_length_are_those_of_runs_that_are_there():
    assert [scores().of_length(n) for n in (2, 4)] == [[0.5, 0.1, 0.6], [0.7]]


def test_of_equally_distant_runs_the_first():
    even = [[0.0, 0.3, 0.3], [0.0, 0.3, OUT]]
    assert least_distant(scores(even), n=1) == [0]


@pytest.mark.parametrize(("n", "expected"), [(1, [1]), (2, [1, 3]), (3, [0, 1, 3])])
def test_the_least_influential_wherever_they_stand(n, expected):
    assert least_influential(scores(), n=n) == expected


@pytest.mark.parametrize(("n", "expected"), [(1, [2]), (2, [2, 3]), (3, [0, 2, 3])])
def test_the_smallest_weights(n, expected):
    assert least_magnitude(scores(), n=n) == expected


@pytest.mark.parametrize(
    ("n", "runs"), [(1, [(0,), (1,), (2,)]), (2, [(0, 1), (2, 3)]), (3, [(1, 2, 3)])]
)
def test_random_runs_are_all_but_the_least_distant_and_equally_likely(n, runs):
    drawn = Counter(tuple(random_run(scores(), n=n, seed=seed)) for seed in range(300))
    assert set(drawn) == set(runs)
    # Four deviations of a binomial.
    expected = 300 / len(runs)
    assert all(abs(count - expected) <= 4 * math.sqrt(expected) for count in drawn.values())


def test_a_seed_repeats_a_draw_and_the_global_generator_has_no_part_in_it():
    torch.manual_seed(1)
    first = random_run(scores(), n=1, seed=5)
    state = torch.get_rng_state()
    assert random_run(scores(), n=1, seed=5) == first
    assert torch.equal(torch.get_rng_state(), state)


def test_given_blocks_come_in_rising_order():
    assert given(scores(), blocks=[3, 0]) == [0, 3]


@pytest.mark.parametrize("n", [0, -1, 4, 5, 1.5, True])
@pytest.mark.parametrize(
    "choice",
    [least_distant, least_influential, least_magnitude, lambda s, n: random_run(s, n=n, seed=0)],
)
def test_a_number_of_blocks_that_cannot_go(choice, n):
    with pytest.raises(UserError) as refused:
        choice(scores(), n=n)
    assert str(refused.value) == (
        f"stages.<stage>.choose.n={n}: expected a number of blocks from 1 to 3, for the model has "
        "4 and one must stay"
    )


def test_a_model_of_one_block():
    with pytest.raises(UserError) as refused:
        least_distant(scores([[0.0, 0.5]]), n=1)
    assert str(refused.value) == (
        "stages.<stage>.choose.n=1: the model has one block, and one must stay; take a deeper one"
    )


@pytest.mark.parametrize(
    ("blocks", "why"),
    [
        ([], "expected one number or more of blocks, counted from 0"),
        ([0.5], "expected one number or more of blocks, counted from 0"),
        ([1, 4], "there is no block 4; the model has the blocks 0 to 3"),
        ([-1], "there is no block -1; the model has the blocks 0 to 3"),
        ([2, 1, 2], "a block stands twice; expected each once"),
        ([3, 2, 1, 0], "these are all blocks of the model; leave one out at least"),
    ],
)
def test_given_blocks_that_cannot_go(blocks, why):
    with pytest.raises(UserError) as refused:
        given(scores(), blocks=blocks)
    assert str(refused.value) == f"stages.<stage>.choose.blocks={blocks}: {why}"
