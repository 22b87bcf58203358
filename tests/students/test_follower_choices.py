"""Which layers follow: by similarity, by the gap, by hand, by chance."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from stillhouse.errors import UserError
from stillhouse.records.similarity import Similarity
from stillhouse.students.follower_choices import given, largest_gap, most_similar, random_layers
from stillhouse.students.sharing import sharing_of, write_sharing


def scored(*scores: float, kinds: str | None = None) -> Any:
    """Return a similarity with these scores, of layers of these kinds."""
    layer_types = None if kinds is None else tuple(kinds)
    similarity = Similarity(torch.eye(len(scores), dtype=torch.float64), 1, 8, layer_types)
    similarity.__dict__["scores"] = list(scores)
    return similarity


def of_layers(layers: int) -> Any:
    """Return a similarity of so many layers, layer 0 the most similar, then 1, and so on."""
    return scored(*[1 - 0.01 * layer for layer in range(layers)])


def test_scores_leave_the_diagonal_out():
    matrix = torch.tensor([[1.0, 0.2, 0.4], [0.2, 1.0, 0.9], [0.4, 0.9, 1.0]]).double()
    assert Similarity(matrix, 1, 8).scores == pytest.approx([0.3, 0.55, 0.65])


@pytest.mark.parametrize(
    ("fraction", "layers", "count"),
    [
        (0.23, 22, 5),
        (0.41, 22, 9),
        (0.77, 22, 17),
        (0.25, 6, 2),
        (0.15, 10, 2),
        (0.29, 50, 15),
        (0, 22, 0),
        (0.99, 22, 21),
        (0.41, 2, 1),
    ],
)
def test_a_fraction_is_rounded_to_layers(fraction, layers, count):
    """0.29 of 50 is 14.5, in floating point a hair less."""
    assert most_similar(of_layers(layers), fraction=fraction) == list(range(1, count + 1))


def test_the_most_similar_come_first_and_layer_0_never():
    similarity = scored(0.9, 0.1, 0.7, 0.8, 0.7, 0.2)
    assert most_similar(similarity, fraction=0.5) == [3, 2, 4]


@pytest.mark.parametrize("fraction", [1, 1.0, -0.1, 41])
def test_a_number_that_is_no_fraction(fraction):
    with pytest.raises(UserError) as refused:
        most_similar(of_layers(4), fraction=fraction)
    assert str(refused.value) == (
        f"sharing.fraction={fraction}: expected the share of layers that follow another, from 0 to "
        "1, the latter excluded"
    )


@pytest.mark.parametrize(
    ("scores", "group_size", "leaders"),
    [
        # The gap agrees with the paper's constraint: first and last layers lie below.
        ([0.2, 0.7, 0.8, 0.75, 0.1], None, [0, 1, 1, 1, 4]),
        # Layer 3 lies below amid the others: the longer run is kept, layers 1 and 2 share nothing.
        ([0.1, 0.8, 0.8, 0.2, 0.7, 0.9, 0.8, 0.1], None, [0, 1, 2, 3, 4, 4, 4, 7]),
        # Of two equally long runs the first.
        ([0.8, 0.8, 0.1, 0.8, 0.8], None, [0, 0, 2, 3, 4]),
        # Layer 0 leads.
        ([0.8, 0.7, 0.9, 0.1], None, [0, 0, 0, 3]),
        ([0.1, 0.8, 0.8, 0.8, 0.8, 0.8, 0.1], 2, [0, 1, 1, 3, 3, 5, 6]),
        ([0.1, 0.8, 0.8, 0.8, 0.8, 0.8, 0.1], 3, [0, 1, 1, 1, 4, 4, 6]),
        ([0.1, 0.8, 0.8, 0.1], 9, [0, 1, 1, 3]),
        # No gap, nothing below it.
        ([0.6, 0.6], None, [0, 0]),
        # A lone layer above: it leads nobody.
        ([0.1, 0.2, 0.9, 0.1], None, [0, 1, 2, 3]),
    ],
)
def test_the_run_above_the_largest_gap_shares(scores, group_size, leaders):
    followers = largest_gap(scored(*scores), group_size=group_size)
    assert sharing_of(followers, len(scores), key="sharing").leaders == tuple(leaders)


def test_followers_above_the_gap_come_the_most_similar_first():
    assert largest_gap(scored(0.1, 0.9, 0.7, 0.9, 0.8, 0.1), group_size=None) == [3, 4, 2]


def test_the_first_layer_of_a_kind_is_never_chosen(tmp_path: Path):
    """s: a sliding window, f: full attention."""
    similarity = scored(0.9, 0.8, 0.7, 0.6, 0.5, kinds="sfsff")
    assert most_similar(similarity, fraction=0.8) == [2, 3, 4]
    like_path = choice(tmp_path, [2, 4], 5)
    draws = [random_layers(similarity, seed=seed, like_path=like_path) for seed in range(50)]
    assert {tuple(sorted(drawn)) for drawn in draws} == {(2, 3), (3, 4)}


@pytest.mark.parametrize(
    ("group_size", "leaders"), [(None, [0, 1, 2, 1, 2, 1, 2]), (3, [0, 1, 2, 1, 4, 5, 4])]
)
def test_a_run_of_several_kinds_has_a_leader_of_each_in_every_group(group_size, leaders):
    similarity = scored(0.1, 0.8, 0.8, 0.8, 0.8, 0.8, 0.8, kinds="ffsfsfs")
    followers = largest_gap(similarity, group_size=group_size)
    sharing = sharing_of(followers, 7, key="sharing", layer_types=similarity.layer_types)
    assert sharing.leaders == tuple(leaders)


@pytest.mark.parametrize("group_size", [1, 0, -2])
def test_a_group_of_less_than_two(group_size):
    with pytest.raises(UserError) as refused:
        largest_gap(of_layers(4), group_size=group_size)
    assert str(refused.value) == (
        f"sharing.group_size={group_size}: expected 2 or more layers, a leader and its followers, "
        "or null for one group"
    )


def test_given_ones_keep_their_order():
    assert given(of_layers(8), followers=[5, 2, 3]) == [5, 2, 3]


def choice(folder: Path, followers: list[int], layers: int) -> str:
    write_sharing(sharing_of(followers, layers, key="sharing"), folder)
    return str(folder)


def test_random_ones_are_as_many_and_any_but_the_first(tmp_path: Path):
    """Of 9 pairs 1 to 3 are in four each, 4 and 5 in three: 178 and 133 times over 400 seeds."""
    like_path = choice(tmp_path, [4, 5], 6)
    draws = [random_layers(of_layers(6), seed=seed, like_path=like_path) for seed in range(400)]
    assert all(len(set(drawn)) == 2 for drawn in draws)
    assert all(set(drawn) != {4, 5} for drawn in draws), "the choice that it is compared with"
    times = Counter(layer for drawn in draws for layer in drawn)
    assert set(times) == {1, 2, 3, 4, 5}
    assert all(140 < times[layer] < 216 for layer in (1, 2, 3))
    assert all(95 < times[layer] < 171 for layer in (4, 5))


@pytest.mark.parametrize("followers", [[], [1, 2]])
def test_where_there_is_one_set_it_is_drawn(tmp_path: Path, followers: list[int]):
    drawn = random_layers(of_layers(3), seed=0, like_path=choice(tmp_path, followers, 3))
    assert sorted(drawn) == followers


def test_a_random_choice_depends_on_its_seed_only(tmp_path: Path):
    like_path = choice(tmp_path, list(range(10, 20)), 40)
    torch.manual_seed(0)
    first = random_layers(of_layers(40), seed=3, like_path=like_path)
    state = torch.get_rng_state()
    torch.rand(5)
    assert random_layers(of_layers(40), seed=3, like_path=like_path) == first
    assert random_layers(of_layers(40), seed=4, like_path=like_path) != first
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_choice_for_another_model(tmp_path: Path):
    like_path = choice(tmp_path, [1], 5)
    with pytest.raises(UserError) as refused:
        random_layers(of_layers(6), seed=0, like_path=like_path)
    assert str(refused.value) == (
        f"sharing.like_path={like_path}: a choice of 5 layers, the model has 6; expected a choice "
        "for the same model"
    )


def test_no_choice_to_be_like(tmp_path: Path):
    with pytest.raises(UserError) as refused:
        random_layers(of_layers(6), seed=0, like_path=str(tmp_path))
    assert str(refused.value).startswith(f"sharing.like_path={tmp_path}: no choice of followers ")
