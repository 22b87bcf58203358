"""Tiny pictures, points and generators of either."""

from functools import wraps
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from stillhouse.data.images import ImageData
from stillhouse.data.pictures.pictures import Pictures, Samples, Split
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.students.denoisers import Denoiser, point_network, small_dit

DIGITS = {"_target_": "stillhouse.data.pictures.digits.digits", "validation": 20, "test": 30}
RING = {
    "_target_": "stillhouse.data.pictures.mixtures.ring",
    "components": 8,
    "classes": 4,
    "radius": 1.4,
    "deviation": 0.1,
}
EMOJI = {
    "_target_": "stillhouse.data.pictures.emoji.emoji",
    "font_path": "",
    "names_path": "",
    "image_size": 8,
    "synthetic": True,
}
POINTS = {
    "_target_": "stillhouse.data.pictures.mixtures.drawn",
    "mixture": RING,
    "train_points": 50,
    "held_out_points": 12,
}


def lacking(*, split: Split) -> Pictures:
    """Return pictures of which a split has none."""
    pixels = Samples(torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)))
    splits: dict[Split, Samples] = dict.fromkeys(("train", "validation", "test"), pixels)
    return Pictures("a folder", "none", (), splits | {split: pixels.picked(torch.arange(0))})


def captioned_otherwise() -> Pictures:
    """Return pictures whose caption no other source has."""
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = Samples(pixels, captions=("a lighthouse",) * 6)
    return Pictures("a folder", "none", (), dict.fromkeys(("train", "validation", "test"), samples))


def node_of(source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return the node of a source's `ImageData`."""
    target = {"_target_": "stillhouse.data.images.ImageData", "_partial_": True}
    return target | {"source": source, "batch_size": 4, "evaluation_batch_size": 5} | changes


def data_of(source: dict[str, Any], **changes: Any) -> ImageData:
    """Return a source's `ImageData`."""
    node = node_of(source, **changes)
    return ImageData(0, **{k: v for k, v in node.items() if not k.startswith("_")})


def shaken(denoiser: Denoiser, seed: int = 1) -> Denoiser:
    """Give every parameter a value: a network that begins with zeros says nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return denoiser.eval()


def point_generator(seed: int = 1) -> Denoiser:
    """Return a generator of points with random weights."""
    network = point_network(data_of(POINTS), width=8, num_layers=1, guidance_embeds=False)
    return shaken(network, seed)


def transformer(data: ImageData, patch_size: int = 4) -> Denoiser:
    """Return a diffusion transformer of one layer, as it begins."""
    shape = {"width": 8, "num_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1.0}
    return small_dit(data, patch_size=patch_size, **shape, guidance_embeds=False)


def digit_generator(seed: int = 1) -> Denoiser:
    """Return a generator of digits with random weights."""
    return shaken(transformer(data_of(DIGITS)), seed)


def saved(
    denoiser: Denoiser,
    folder: Path,
    source: dict[str, Any],
    times: dict[str, list[float]] | None = None,
) -> str:
    """Write a generator's folder and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    denoiser.save(folder, data_of(source), times=times or {}, guidance_scale=1.0)
    return str(folder)


def ring_mixture() -> GaussianMixture:
    """Return the mixture that the points come from."""
    return instantiate(RING)


class _Copied(torch.autograd.Function):
    """A copy without a forward-mode derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


class Opaque(torch.nn.Linear):
    """A layer whose tangent is missing."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return _Copied.apply(super().forward(input))


@wraps(point_network)
def without_tangent(data: ImageData, **settings: Any) -> Denoiser:
    """Return a generator of points one module of which has no forward-mode derivative."""
    denoiser = point_network(data, **settings)
    embed = denoiser.model.embed
    denoiser.model.embed = Opaque(embed.in_features, embed.out_features)
    return denoiser
