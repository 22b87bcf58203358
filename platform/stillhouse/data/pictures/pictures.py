"""What a source of pictures hands on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Samples:
    """The samples of a split.

    Attributes:
        values: [N, C, H, W] of pixels from 0 to 1, or points [N, D].
        labels: [N]; None without classes.
        captions: of each, or None.
    """

    values: Float[Tensor, "N ..."]
    labels: Int[Tensor, "N"] | None = None
    captions: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.values)

    def picked(self, places: Int[Tensor, "M"]) -> "Samples":
        """Return some of them."""
        captions = self.captions
        return Samples(
            self.values[places],
            None if self.labels is None else self.labels[places],
            None if captions is None else tuple(captions[i] for i in places.tolist()),
        )


@dataclass(frozen=True)
class Pictures:
    """A data set.

    Attributes:
        name, licence: for the model card.
        classes: their names, in the order of the labels; empty without.
        splits: its parts.
    """

    name: str
    licence: str
    classes: tuple[str, ...]
    splits: Mapping[Split, Samples]


def held_out(samples: Samples, *, validation: int, test: int) -> Mapping[Split, Samples]:
    """Cut samples into splits; which are held out is decided by their number alone.

    Args:
        samples: all.
        validation, test: how many are held out for each.
    """
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0))
    cuts = {
        "test": order[:test],
        "validation": order[test : test + validation],
        "train": order[test + validation :],
    }
    return {split: samples.picked(places.sort().values) for split, places in cuts.items()}  # type: ignore[return-value]
