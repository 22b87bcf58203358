"""How alike the layers of a model attend, as a record and a JSON artifact."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import write_json

SIMILARITY = "similarity.json"


@dataclass(frozen=True)
class Similarity:
    """How alike layers attend.

    Attributes:
        matrix: [L, L], sim(i, j); symmetric, its diagonal 1.
        windows: samples that it is the mean over.
        tokens: in all of these.
        layer_types: the kind of every layer as the model's config has it, `sliding_attention` say;
            None where all are of one kind.
    """

    matrix: Float[Tensor, "L L"]
    windows: int
    tokens: int
    layer_types: tuple[str, ...] | None = None

    @property
    def layers(self) -> int:
        """L."""
        return len(self.matrix)

    def with_one_before(self, run: Sequence[int]) -> list[int]:
        """Return the layers of a run that have one of their kind before them in it."""
        kinds = [self.layer_types[layer] if self.layer_types else "" for layer in run]
        return [layer for place, layer in enumerate(run) if kinds[place] in kinds[:place]]

    @cached_property
    def scores(self) -> list[float]:
        """s_i: how alike layer i is to the others in the mean."""
        others = self.matrix.sum(-1) - self.matrix.diagonal()
        return (others / (self.layers - 1)).tolist()

    @property
    def cut(self) -> float | None:
        """The middle of the largest gap between sorted scores, the lowest of equal ones.

        None where all scores are equal.
        """
        gap, low, high = max(
            ((high - low, low, high) for low, high in pairwise(sorted(self.scores))),
            key=lambda found: found[0],
        )
        return (low + high) / 2 if gap > 0 else None


def write_similarity(similarity: Similarity, folder: Path) -> None:
    """Write what was measured where the choice of followers reads it."""
    content = {
        "layers": similarity.layers,
        "windows": similarity.windows,
        "tokens": similarity.tokens,
        "layer_types": similarity.layer_types,
        "similarity": similarity.matrix.tolist(),
        "scores": similarity.scores,
        "cut": similarity.cut,
    }
    write_json(folder / SIMILARITY, content)


def read_similarity(path: str, *, key: str) -> Similarity:
    """Read what `write_similarity` wrote.

    Args:
        path: the folder.
        key: of the path, for messages.

    Raises:
        UserError: where there is no such file, or it holds something else.
    """
    try:
        content = json.loads((Path(path) / SIMILARITY).read_text())
        matrix = torch.tensor(content["similarity"], dtype=torch.float64)
        windows, tokens = int(content["windows"]), int(content["tokens"])
        kinds = tuple(map(str, content.get("layer_types") or ())) or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{key}={path}: no similarity of layers can be read from {SIMILARITY}; expected what "
            "the stage `analyse` wrote"
        ) from error
    if matrix.ndim != 2 or len(set(matrix.shape)) > 1 or len(matrix) < 2:
        raise UserError(
            f"{key}={path}: {SIMILARITY} holds a similarity of the shape {list(matrix.shape)}; "
            "expected [layers, layers], of two layers or more; run the stage `analyse` anew"
        )
    if kinds is not None and len(kinds) != len(matrix):
        raise UserError(
            f"{key}={path}: {SIMILARITY} names {len(kinds)} layer_types of {len(matrix)} layers; "
            "run the stage `analyse` anew"
        )
    return Similarity(matrix, windows, tokens, kinds)
