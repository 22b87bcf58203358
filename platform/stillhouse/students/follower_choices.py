"""Which layers take another's attention matrix, by how alike the layers attend (EchoAtt).

Siblings with one signature: from the similarity of a model's layers to the followers, in the order
in which they are chosen. Who leads them is `sharing_of`'s to say: the nearest layer of their kind
before them that is no follower. So layer 0 and the first layer of each further kind are never
chosen. Layers are counted from 0.
"""

from collections.abc import Sequence

import torch

from stillhouse.errors import UserError
from stillhouse.records.similarity import Similarity
from stillhouse.students.sharing import read_sharing


def most_similar(similarity: Similarity, *, fraction: float) -> Sequence[int]:
    """Choose the layers that are most like the others in the mean, the most similar first.

    Args:
        similarity: of the model's layers.
        fraction: of the layers, rounded to the nearest number of them and halves up, but at most
            all that may follow. At 22 layers 0.23, 0.41 and 0.77 are 5, 9 and
            17, as in the paper.

    Raises:
        UserError: for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise UserError(
            f"sharing.fraction={fraction}: expected the share of layers that follow another, from "
            "0 to 1, the latter excluded"
        )
    # The product of two decimals may lie a hair below the half that it stands for.
    count = int(round(fraction * similarity.layers, 9) + 0.5)
    return _by_score(_may_follow(similarity), similarity)[:count]


def largest_gap(similarity: Similarity, *, group_size: int | None) -> Sequence[int]:
    """Cut the sorted scores at their largest gap and share what lies above, the ends left alone.

    The paper wants the layers that share nothing to be first and last ones, and does not say what
    happens when the gap leaves out another. Here the longest run of consecutive layers above the
    cut is kept, the first of equally long ones; every layer outside of it shares nothing. Where
    all scores are equal, nothing lies below and the run is the whole model. Followers come in the
    order of their scores, the most similar first.

    Args:
        similarity: of the model's layers.
        group_size: layers of the run that share one matrix, the first of each group (of each kind
            of layer in it) leading; the last group may be smaller. null makes one group of the run.

    Raises:
        UserError: for a group of less than two layers.
    """
    if group_size is not None and group_size < 2:
        raise UserError(
            f"sharing.group_size={group_size}: expected 2 or more layers, a leader and its "
            "followers, or null for one group"
        )
    run = _longest_run_above(similarity.cut, similarity.scores)
    size = group_size or len(run)
    groups = [run[start : start + size] for start in range(0, len(run), size)]
    followers = [layer for group in groups for layer in similarity.with_one_before(group)]
    return _by_score(followers, similarity)


def given(similarity: Similarity, *, followers: list[int]) -> Sequence[int]:
    """Take the followers that are given, in their order.

    Args:
        similarity: of the model's layers; it decides nothing here.
        followers: layers counted from 0.
    """
    return followers


def random_layers(similarity: Similarity, *, seed: int, like_path: str) -> Sequence[int]:
    """Draw as many followers as another choice has: the baseline that a similarity must beat.

    Every set of layers that may follow is as likely as any other, but for the set that the other
    choice is: that one is drawn only where there is no further one.

    Args:
        similarity: of the model's layers; only their number and kinds count here.
        seed: of the draw, which has a generator of its own.
        like_path: folder of the other choice.

    Raises:
        UserError: as `read_sharing`, and where the other choice is of another number of layers.
    """
    like = read_sharing(like_path, key="sharing.like_path")
    if len(like.leaders) != similarity.layers:
        raise UserError(
            f"sharing.like_path={like_path}: a choice of {len(like.leaders)} layers, the model has "
            f"{similarity.layers}; expected a choice for the same model"
        )
    generator = torch.Generator().manual_seed(seed)
    count, candidates = len(like.order), _may_follow(similarity)
    while True:
        places = torch.randperm(len(candidates), generator=generator)[:count].tolist()
        drawn = [candidates[place] for place in places]
        if set(drawn) != set(like.order) or count in (0, len(candidates)):
            return drawn


def _may_follow(similarity: Similarity) -> list[int]:
    """Return the layers that have one of their kind before them."""
    return similarity.with_one_before(range(similarity.layers))


def _by_score(layers: Sequence[int], similarity: Similarity) -> list[int]:
    """Sort layers, the highest score first and the earlier of equal ones."""
    return sorted(layers, key=lambda layer: -similarity.scores[layer])


def _longest_run_above(cut: float | None, scores: Sequence[float]) -> range:
    """Return the longest run of consecutive layers above the cut, the first of equal ones."""
    runs = [range(0)]
    for layer, score in enumerate(scores):
        if cut is None or score > cut:
            start = runs[-1].start if runs[-1].stop == layer and runs[-1] else layer
            runs.append(range(start, layer + 1))
    return max(runs, key=len)
