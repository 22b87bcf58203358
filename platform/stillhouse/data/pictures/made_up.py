"""Random pictures in place of a package."""

from collections.abc import Sequence

import torch

from stillhouse.data.pictures.pictures import Pictures, Samples, held_out

COUNT, HELD_OUT = 64, 16


def made_up(
    name: str, *, shape: tuple[int, int, int], classes: Sequence[str], captioned: bool = False
) -> Pictures:
    """Make pictures that need nothing fetched, always the same ones, of every class in turn.

    Args:
        name: of the set in whose place they stand.
        shape: (C, H, W).
        classes: their names.
        captioned: whether each has a caption.
    """
    values = torch.rand(COUNT, *shape, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(COUNT) % len(classes)
    captions = tuple(f"{classes[label]} {i}" for i, label in enumerate(labels.tolist()))
    samples = Samples(values, labels, captions if captioned else None)
    splits = held_out(samples, validation=HELD_OUT, test=HELD_OUT)
    title = f"random pictures in place of {name}"
    return Pictures(title, "public domain", tuple(classes), splits)
