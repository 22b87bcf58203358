"""What a source of pictures hands on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.errors import UserError

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

    Raises:
        UserError: when none is left for training.
    """
    places = held_out_places(len(samples), validation=validation, test=test)
    return {split: samples.picked(chosen.sort().values) for split, chosen in places.items()}


def mixed(samples: Samples) -> Samples:
    """Return samples in an order of chance, always the same: the first n are of every class."""
    return samples.picked(order_of_chance(len(samples)))


def order_of_chance(count: int) -> Int[Tensor, "M"]:
    """Return places in an order that their number alone decides."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def held_out_places(
    count: int, *, validation: int, test: int, most: int | None = None
) -> Mapping[Split, Int[Tensor, "M"]]:
    """Return the places of each split's samples, in an order of chance.

    Args:
        count: of all samples.
        validation, test: how many are held out for each.
        most: keep n of each split; None keeps all.

    Raises:
        UserError: when none is left for training.
    """
    if validation + test >= count:
        raise UserError(
            f"data.source.validation={validation} and data.source.test={test}: of {count} pictures "
            "none is left for training; hold fewer out, or give more pictures"
        )
    order = order_of_chance(count)
    cuts: dict[Split, Tensor] = {
        "train": order[test + validation :],
        "validation": order[test : test + validation],
        "test": order[:test],
    }
    return {split: places[:most] for split, places in cuts.items()}
