"""One picture as a tensor: kinds of pixels, transparency, turning, cropping and resizing."""

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from stillhouse.data.pictures.reading import PictureReader, cropped, resized
from stillhouse.errors import UserError

# Two rows of three: red, green, blue; black, grey, white.
COLOURS = np.array(
    [[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [51, 51, 51], [255, 255, 255]]], np.uint8
)
# As ITU-R 601-2 weighs them.
GREY = torch.tensor([[[0.299, 0.587, 0.114], [0.0, 0.2, 1.0]]])


def read(picture, mode="rgb", image_size=None, kind="png", **options):
    file = BytesIO()
    picture.save(file, kind, **options)
    file.seek(0)
    return PictureReader("data.source.x=y", mode, image_size).read(file, "a picture")


def test_rgb_is_what_it_is_and_grey_is_weighed():
    picture = Image.fromarray(COLOURS)
    assert torch.equal(read(picture), torch.from_numpy(COLOURS).permute(2, 0, 1) / 255)
    torch.testing.assert_close(read(picture, "grey"), GREY, atol=1 / 255, rtol=0)


def test_a_grey_picture_has_three_equal_channels_in_rgb():
    picture = Image.fromarray(COLOURS).convert("L")
    assert torch.equal(read(picture), read(picture, "grey").repeat(3, 1, 1))


def test_a_palette_is_its_colours():
    assert torch.equal(
        read(Image.fromarray(COLOURS).convert("P", palette=Image.Palette.ADAPTIVE)),
        torch.from_numpy(COLOURS).permute(2, 0, 1) / 255,
    )


def test_black_and_white():
    picture = Image.fromarray(np.array([[True, False]]))
    assert picture.mode == "1"
    assert read(picture, "grey").tolist() == [[[1.0, 0.0]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_is_laid_on_white(mode):
    """Black at opacities 0, 0.4 and 1."""
    alpha = np.array([[0, 102, 255]], np.uint8)
    dark = [np.zeros_like(alpha)] * (len(mode) - 1)
    picture = Image.fromarray(np.stack([*dark, alpha], axis=-1))
    assert picture.mode == mode
    for wanted in ("grey", "rgb"):
        found = read(picture, wanted)
        expected = torch.tensor([[[1.0, 0.6, 0.0]]]).expand_as(found)
        torch.testing.assert_close(found, expected, atol=1 / 255, rtol=0)


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_is_laid_on_white(mode):
    picture = Image.fromarray(np.array([[0, 255]], np.uint8)).convert(mode)
    transparent = (0, 0, 0) if mode == "RGB" else 0
    assert read(picture, "grey", transparency=transparent).tolist() == [[[1.0, 1.0]]]
    assert read(picture, "grey").tolist() == [[[0.0, 1.0]]]


def test_grey_of_16_bits_is_not_cut():
    levels = np.array([[0, 256, 32768, 65535]], np.uint16)
    picture = Image.fromarray(levels)
    expected = torch.tensor([[[0.0, 256 / 65535, 32768 / 65535, 1.0]]])
    torch.testing.assert_close(read(picture, "grey"), expected)
    torch.testing.assert_close(read(picture), expected.expand(3, -1, -1))


def test_a_photograph_is_turned_upright():
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = 6
    found = read(Image.new("RGB", (6, 2)), kind="jpeg", exif=exif)
    assert found.shape == (3, 6, 2)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("L", (2, 2), shade) for shade in (0, 255)]
    found = read(frames[0], "grey", kind="gif", save_all=True, append_images=frames[1:])
    assert found.tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


def test_the_square_in_the_middle():
    values = torch.arange(10.0).expand(3, 4, 10)
    assert cropped(values)[0, 0].tolist() == [3, 4, 5, 6]
    assert torch.equal(cropped(values.mT)[0, :, 0], cropped(values)[0, 0])
    assert cropped(values).shape == (3, 4, 4)


def test_resizing_keeps_the_mean_the_range_and_what_has_the_size():
    """A checkerboard becomes even grey by antialiasing; without, it stays black or white."""
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2
    values = board.float().expand(2, 3, 32, 32)
    assert torch.allclose(resized(values, 8)[..., 1:-1, 1:-1], torch.tensor(0.5), atol=0.02)
    assert float(resized(values, 8).mean()) == pytest.approx(0.5, abs=0.01)
    assert resized(values, 32) is values
    noise = torch.rand(3, 5, 5, generator=torch.Generator().manual_seed(0)).round()
    for size in (2, 3, 16):
        assert resized(noise, size).shape == (3, size, size)
        assert 0 <= float(resized(noise, size).min()) <= float(resized(noise, size).max()) <= 1


def test_a_picture_is_cropped_and_resized():
    wide = np.zeros((20, 60), np.uint8)
    wide[:, 20:40] = 255
    assert torch.equal(read(Image.fromarray(wide), "grey", 5), torch.ones(1, 5, 5))


def test_pictures_of_two_sizes_need_one():
    reader = PictureReader("data.source.x=y", "grey", None)
    for name, size in (("a.png", (4, 2)), ("b.png", (4, 2)), ("c.png", (3, 5))):
        file = BytesIO()
        Image.new("L", size).save(file, "png")
        if name != "c.png":
            assert reader.read(file, name).shape == (1, 2, 4)
    with pytest.raises(UserError) as refusal:
        reader.read(file, "c.png")
    assert str(refusal.value) == (
        "data.source.image_size=null: c.png is 3 wide and 5 high, a.png 4 and 2; expected one size "
        "of all pictures; set data.source.image_size=<pixels>, which crops and resizes them"
    )


def refusal_of(content: bytes) -> str:
    with pytest.raises(UserError) as refusal:
        PictureReader("data.source.x=y", "rgb", 8).read(BytesIO(content), "a.png")
    return str(refusal.value)


def test_a_file_that_is_no_picture():
    line = "the file is no picture that PIL knows; replace it or take it out"
    assert refusal_of(b"text") == f"data.source.x=y, a.png: {line}"
    assert refusal_of(b"") == f"data.source.x=y, a.png: {line}"


def test_a_file_cut_short():
    file = BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "jpeg")
    said = refusal_of(file.getvalue()[:1500])
    begin = "data.source.x=y, a.png: the picture cannot be read: OSError: image file is truncated"
    assert said.startswith(begin)
    assert said.endswith("; replace it or take it out")


def test_pixels_of_32_bits():
    file = BytesIO()
    Image.new("F", (2, 2)).save(file, "tiff")
    assert refusal_of(file.getvalue()) == (
        "data.source.x=y, a.png: the picture cannot be read: ValueError: its pixels have 32 bits, "
        "whose white nobody knows; expected 8 or 16; replace it or take it out"
    )
