"""A choice of followers: who leads them, what is written and read, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from stillhouse.errors import UserError
from stillhouse.students.sharing import group_ends, read_sharing, sharing_of, write_sharing

# EchoAtt's list at 41 % of TinyLlama's 22 layers, layer 8 as the ninth.
PAPER = [2, 5, 4, 3, 7, 6, 18, 9, 8]


def test_the_nearest_layer_before_that_follows_none_leads() -> None:
    sharing = sharing_of(PAPER, 22, key="followers")
    assert sharing.leaders == (0, *[1] * 9, *range(10, 18), 17, 19, 20, 21)
    assert sharing.groups == {1: [2, 3, 4, 5, 6, 7, 8, 9], 17: [18]}
    assert sharing.order == tuple(PAPER)
    assert sharing.followers == (2, 3, 4, 5, 6, 7, 8, 9, 18)


def test_nothing_shared() -> None:
    sharing = sharing_of([], 3, key="followers")
    assert sharing.leaders == (0, 1, 2)
    assert sharing.groups == {}


def test_written_and_read(tmp_path: Path) -> None:
    sharing = sharing_of(PAPER, 22, key="followers")
    write_sharing(sharing, tmp_path)
    assert read_sharing(str(tmp_path), key="student.sharing_path") == sharing
    assert read_sharing(str(tmp_path / "sharing.json"), key="student.sharing_path") == sharing
    # Block 9 ends the first group, block 18 the second; the embeddings are hidden state 0.
    assert group_ends(sharing_path=str(tmp_path)) == [10, 19]


def test_any_leader_before_a_follower_may_be_given(tmp_path: Path) -> None:
    file = tmp_path / "by_hand.json"
    file.write_text(json.dumps({"attention_leaders": [0, 1, 0, 1]}))
    sharing = read_sharing(str(file), key="student.sharing_path")
    assert sharing.groups == {0: [2], 1: [3]}
    assert sharing.order == (2, 3)


@pytest.mark.parametrize(
    ("followers", "message"),
    [
        ([4, 9], "sharing.followers=[4, 9]: there is no layer 9; the model has the layers 0 to 7"),
        ([-1], "sharing.followers=[-1]: there is no layer -1; the model has the layers 0 to 7"),
        (["a"], "sharing.followers=['a']: expected numbers of layers, counted from 0"),
        ([3, 3], "sharing.followers=[3, 3]: a layer stands twice; expected each once"),
        (
            [0, 3],
            "sharing.followers=[0, 3]: layer 0 cannot be a follower, no layer before it computes a "
            "matrix; leave it out",
        ),
    ],
)
def test_followers_that_cannot_be(followers: Any, message: str) -> None:
    with pytest.raises(UserError) as refused:
        sharing_of(followers, 8, key="sharing.followers")
    assert str(refused.value) == message


def test_a_leader_is_the_nearest_of_its_kind():
    kinds = ["full_attention", "sliding_attention"] * 3
    sharing = sharing_of([2, 3, 5], 6, key="followers", layer_types=kinds)
    assert sharing.groups == {0: [2], 1: [3, 5]}
    with pytest.raises(UserError) as refused:
        sharing_of([1, 2], 6, key="sharing.followers", layer_types=kinds)
    assert str(refused.value) == (
        "sharing.followers=[1, 2]: layer 1 (sliding_attention) cannot be a follower, no layer of "
        "its kind before it computes a matrix; leave it out"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"attention_leaders": [0, 2, 2]},
            "layer 1 follows layer 2, which comes after it; a leader comes first",
        ),
        (
            {"attention_leaders": [0, 0, 1]},
            "layer 2 follows layer 1, which itself follows layer 0; expected 0",
        ),
        (
            {"attention_leaders": [1, 1]},
            "layer 0 follows layer 1, which comes after it; a leader comes first",
        ),
        (
            {"attention_leaders": [0, 5]},
            "layer 1 follows layer 5, which is not there; the model has the layers 0 to 1",
        ),
        (
            {"attention_leaders": [0, 0, 2], "followers": [2]},
            "followers=[2], by attention_leaders they are [1]; leave the first out, or make them "
            "agree",
        ),
        (
            {"followers": [2]},
            "no choice of followers can be read from sharing.json; expected what the stage "
            "`sharing` wrote",
        ),
        (
            [],
            "no choice of followers can be read from sharing.json; expected what the stage "
            "`sharing` wrote",
        ),
    ],
)
def test_a_map_that_cannot_be(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "sharing.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        read_sharing(str(tmp_path), key="student.sharing_path")
    assert str(refused.value) == f"student.sharing_path={tmp_path}: {message}"
