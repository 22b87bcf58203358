"""Which layers of a student take the attention matrix of which: followers and their leaders.

Layers are counted from 0. A follower takes the matrix of its leader, a layer before it that is no
follower: the nearest of its kind, where only followers are named. A leader and its followers make a
group.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stillhouse.errors import UserError
from stillhouse.files import write_json
from stillhouse.students.modeling_shared_attention import check_leaders

SHARING = "sharing.json"


@dataclass(frozen=True)
class Sharing:
    """A choice of followers.

    Attributes:
        leaders: for every layer the one whose matrix it takes; itself, where it computes its own.
        order: the followers in the order in which they were chosen.
    """

    leaders: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def followers(self) -> tuple[int, ...]:
        """The followers, in rising order."""
        return tuple(sorted(self.order))

    @property
    def groups(self) -> dict[int, list[int]]:
        """Leader -> its followers in rising order, of leaders that have any."""
        groups: dict[int, list[int]] = {}
        for follower in self.followers:
            groups.setdefault(self.leaders[follower], []).append(follower)
        return groups


def sharing_of(
    followers: Sequence[int], layers: int, *, key: str, layer_types: Sequence[str] | None = None
) -> Sharing:
    """Give every follower its leader, the nearest layer of its kind before it that is no follower.

    Args:
        followers: in any order; none shares nothing.
        layers: how many the model has.
        key: what the user set, for messages.
        layer_types: the kind of every layer, for those of a group must see the same keys; None
            where all are of one kind.

    Raises:
        UserError: for what is no number, a layer that is not there or stands twice, for layer 0,
            which has no layer before it, and for the first layer of a kind.
    """
    chosen = tuple(followers)
    if not all(type(layer) is int for layer in chosen):
        raise UserError(f"{key}={list(chosen)}: expected numbers of layers, counted from 0")
    wrong = [layer for layer in chosen if not 0 <= layer < layers]
    if wrong:
        raise UserError(
            f"{key}={list(chosen)}: there is no layer {wrong[0]}; the model has the layers 0 to "
            f"{layers - 1}"
        )
    if len(set(chosen)) < len(chosen):
        raise UserError(f"{key}={list(chosen)}: a layer stands twice; expected each once")
    if 0 in chosen:
        raise UserError(
            f"{key}={list(chosen)}: layer 0 cannot be a follower, no layer before it computes a "
            "matrix; leave it out"
        )
    kinds = layer_types or [""] * layers
    leaders: list[int] = []
    leader_of_kind: dict[str, int] = {}
    for layer, kind in enumerate(kinds):
        if layer not in chosen:
            leader_of_kind[kind] = layer
        elif kind not in leader_of_kind:
            raise UserError(
                f"{key}={list(chosen)}: layer {layer} ({kind}) cannot be a follower, no layer of "
                "its kind before it computes a matrix; leave it out"
            )
        leaders.append(leader_of_kind[kind])
    return Sharing(tuple(leaders), chosen)


def write_sharing(sharing: Sharing, folder: Path) -> None:
    """Write the choice where a student's recipe reads it."""
    content = {"attention_leaders": list(sharing.leaders), "followers": list(sharing.order)}
    write_json(folder / SHARING, content)


def read_sharing(path: str, *, key: str) -> Sharing:
    """Read what `write_sharing` wrote.

    Args:
        path: the folder, or the file itself.
        key: of the path, for messages.

    Raises:
        UserError: where there is no such file, or it says something else.
    """
    file = Path(path) / SHARING if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text())
        leaders = [int(leader) for leader in content["attention_leaders"]]
        followers = [layer for layer, leader in enumerate(leaders) if leader != layer]
        order = [int(f) for f in content.get("followers", followers)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{key}={path}: no choice of followers can be read from {file.name}; expected what the "
            "stage `sharing` wrote"
        ) from error
    try:
        check_leaders(leaders, None)
    except ValueError as error:
        raise UserError(f"{key}={path}: {error}") from error
    if sorted(order) != followers:
        raise UserError(
            f"{key}={path}: followers={order}, by attention_leaders they are {followers}; leave "
            "the first out, or make them agree"
        )
    return Sharing(tuple(leaders), tuple(order))


def group_ends(*, sharing_path: str) -> list[int]:
    """Return where each group ends, as hidden states are numbered: i is what block i - 1 hands on.

    Args:
        sharing_path: folder of a choice of followers.

    Raises:
        UserError: as `read_sharing`.
    """
    groups = read_sharing(sharing_path, key="sharing_path").groups
    return [followers[-1] + 1 for followers in groups.values()]
