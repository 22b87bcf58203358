"""Files of pictures as tensors: kinds of pixels, transparency and sizes are made alike.

A picture is turned upright as its EXIF says; of an animation the first frame is read. What is
transparent, in RGBA, grey with alpha or a palette, is laid on white. Grey of 16 bits keeps them;
palettes, CMYK and black and white become grey or RGB as PIL converts them.
"""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError

Mode = Literal["grey", "rgb"]


@dataclass
class PictureReader:
    """Reads the pictures of one source.

    Attributes:
        origin: the source's key and value, for messages.
        mode: grey has one channel, rgb three.
        image_size: pixels a side that every picture is cropped and resized to; None keeps their
            size, which then is one for all.
    """

    origin: str
    mode: Mode
    image_size: int | None
    _first: tuple[str, torch.Size] | None = field(default=None, init=False)

    def read(self, file: Path | BytesIO, name: str) -> Float[Tensor, "C H W"]:
        """Return a picture's values from 0 to 1.

        Args:
            file: in a format that PIL knows.
            name: of the picture in its source, for messages.

        Raises:
            UserError: for a file that PIL cannot read, pixels of 32 bits, and a picture of another
                size than the first where `image_size` is None.
        """
        place = f"{self.origin}, {name}"
        try:
            with Image.open(file) as opened:
                values = values_of(ImageOps.exif_transpose(opened), self.mode)
        except UnidentifiedImageError as error:
            raise UserError(
                f"{place}: the file is no picture that PIL knows; replace it or take it out"
            ) from error
        except Exception as error:  # the library raises whatever a broken file makes it
            raise UserError(
                f"{place}: the picture cannot be read: {one_line(error)}; replace it or take it out"
            ) from error
        if self.image_size is not None:
            return resized(cropped(values), self.image_size)
        self._compare(name, values.shape)
        return values

    def _compare(self, name: str, shape: torch.Size) -> None:
        first, known = self._first = self._first or (name, shape)
        if shape != known:
            raise UserError(
                f"data.source.image_size=null: {name} is {shape[2]} wide and {shape[1]} high, "
                f"{first} {known[2]} and {known[1]}; expected one size of all pictures; set "
                "data.source.image_size=<pixels>, which crops and resizes them"
            )


def values_of(picture: Image.Image, mode: Mode) -> Float[Tensor, "C H W"]:
    """Return the values of a picture's pixels, from 0 to 1.

    Raises:
        ValueError: for pixels that PIL does not convert, and for numbers of 32 bits.
    """
    if picture.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits, whose white nobody knows; expected 8 or 16")
    if picture.mode.startswith("I;16"):
        # PIL's own conversion to 8 bits takes all but the darkest for white.
        grey = torch.from_numpy(np.asarray(picture).astype(np.float32) / 65535).unsqueeze(0)
        return grey if mode == "grey" else grey.repeat(3, 1, 1)
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    pixels = np.array(picture.convert("L" if mode == "grey" else "RGB"))
    values = torch.from_numpy(pixels).float().div(255)
    return values.unsqueeze(0) if mode == "grey" else values.permute(2, 0, 1).contiguous()


def cropped(values: Float[Tensor, "*B C H W"]) -> Float[Tensor, "*B C S S"]:
    """Return the square in the middle, as large as it can be."""
    height, width = values.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return values[..., top : top + side, left : left + side]


def resized(values: Float[Tensor, "*B C S S"], image_size: int) -> Float[Tensor, "*B C T T"]:
    """Return square pictures at another size: bilinear, and antialiased where they shrink."""
    if values.shape[-1] == image_size:
        return values
    flat = values.reshape(-1, *values.shape[-3:])
    size = (image_size, image_size)
    made = F.interpolate(flat, size, mode="bilinear", antialias=True).clamp(0, 1)
    return made.reshape(*values.shape[:-2], *size)
