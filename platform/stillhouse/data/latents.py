"""Latents: pictures as an autoencoder's codes, which generators learn in the place of pixels."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.data.images import ImageData, Numbers
from stillhouse.data.pictures.pictures import Samples, Split
from stillhouse.errors import UserError
from stillhouse.files import write_json
from stillhouse.ranges import Count, CountFrom0
from stillhouse.students.autoencoders import Autoencoder, load_autoencoder
from stillhouse.students.few_step_pipeline import decoded

LATENTS, PICTURES, VAE = "latents.safetensors", "pictures.json", "vae"
BATCH = 64


@dataclass(frozen=True)
class Latents:
    """A store, with the autoencoder beside it, as a pipeline of diffusers has it: `vae`.

    Attributes:
        folder: where it lies.
        values: of each split's pictures, in their order [N, C, H, W].
        pictures: hash of each split's pictures.
    """

    folder: Path
    values: Mapping[str, Float[Tensor, "N C H W"]]
    pictures: Mapping[str, str]

    def write(self) -> None:
        """Write the latents; the autoencoder is written by who encodes."""
        tensors = {split: t.contiguous() for split, t in self.values.items()}
        save_file(tensors, self.folder / LATENTS)
        write_json(self.folder / PICTURES, dict(self.pictures))

    @cached_property
    def autoencoder(self) -> Autoencoder:
        """What made them, on the GPU where there is one."""
        found = load_autoencoder(str(self.folder / VAE), key="data.latents_path")
        return found.to("cuda" if torch.cuda.is_available() else "cpu")


def hash_of(values: Tensor) -> str:
    """Return the sha256 of a tensor's values."""
    return hashlib.sha256(values.contiguous().numpy().data).hexdigest()


def read_latents(path: str, *, key: str) -> Latents:
    """Return the store in a folder.

    Raises:
        UserError: for a folder without one.
    """
    folder = Path(path).expanduser()
    try:
        pictures = json.loads((folder / PICTURES).read_text())
        return Latents(folder, load_file(folder / LATENTS), pictures)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"{key}={path}: no latents can be read there; expected the artifact of a stage of "
            "conf/stage/encode_latents.yaml"
        ) from error


Statistics = Callable[[Latents], tuple[Numbers, Numbers]]


def of_training(latents: Latents) -> tuple[Numbers, Numbers]:
    """Return mean and deviation of all values of the training split."""
    values = latents.values["train"]
    return float(values.mean(dtype=torch.double)), float(values.double().std())


def of_autoencoder(latents: Latents) -> tuple[Numbers, Numbers]:
    """Return the shift and the scale that the autoencoder's config says, as its generators expect.

    Raises:
        UserError: for a config that says none.
    """
    settings = json.loads((latents.folder / VAE / "config.json").read_text())
    if settings.get("latents_mean") and settings.get("latents_std"):
        return list(settings["latents_mean"]), list(settings["latents_std"])
    scale = settings.get("scaling_factor")
    if not scale:
        raise UserError(
            "data.statistics=of_autoencoder: the config of the autoencoder in "
            f"data.latents_path={latents.folder} has no scaling_factor; expected of_training"
        )
    return settings.get("shift_factor") or 0.0, 1 / scale


class LatentData(ImageData):
    """Pictures of a source as latents; what is compared with the data is decoded first."""

    def __init__(
        self,
        seed: int,
        *,
        latents_path: str,
        source: dict[str, Any],
        captions_path: str | None = None,
        statistics: dict[str, Any] | None = None,
        batch_size: Count,
        evaluation_batch_size: Count,
        max_train_samples: Count | None = None,
        max_evaluation_rows: Count | None = None,
        distinct_train_batches: Count | None = None,
        num_workers: CountFrom0 = 0,
        pin_memory: bool = False,
    ) -> None:
        """Describe the data; nothing is read before it is asked for.

        Args:
            seed: of the order of training.
            latents_path: an artifact of the stage `encode_latents`, of the same source.
            statistics: node of a function that returns mean and deviation, or one of both a
                channel; null for `of_training`.
            source, captions_path, batch_size, evaluation_batch_size, max_train_samples,
                max_evaluation_rows, distinct_train_batches, num_workers, pin_memory: as in
                `ImageData`.
        """
        super().__init__(
            seed,
            source=source,
            captions_path=captions_path,
            batch_size=batch_size,
            evaluation_batch_size=evaluation_batch_size,
            max_train_samples=max_train_samples,
            max_evaluation_rows=max_evaluation_rows,
            distinct_train_batches=distinct_train_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self.latents_path = latents_path
        self._statistics: Statistics = instantiate(statistics) if statistics else of_training

    @cached_property
    def latents(self) -> Latents:
        """The store.

        Raises:
            UserError: for one of other pictures.
        """
        found = read_latents(self.latents_path, key="data.latents_path")
        for split, samples in self.source.splits.items():
            if found.pictures.get(split) != hash_of(samples.values):
                raise UserError(
                    f"data.latents_path={self.latents_path}: its pictures for {split} are others "
                    f"than those of {self.source.name}; encode those of this source"
                )
        return found

    @cached_property
    def splits(self) -> Mapping[Split, Samples]:
        """The latents, with what is said of the pictures."""
        return {
            split: Samples(self.latents.values[split], samples.labels, samples.captions)
            for split, samples in self.source.splits.items()
        }

    @cached_property
    def mean(self) -> Numbers:
        """What is taken off."""
        return self._statistics(self.latents)[0]

    @cached_property
    def std(self) -> Numbers:
        """What is divided by."""
        return self._statistics(self.latents)[1]

    def restored(self, x_0: Tensor) -> Tensor:
        """Return pictures, decoded."""
        autoencoder = self.latents.autoencoder
        parts = super().restored(x_0).split(BATCH)
        return torch.cat([decoded(autoencoder, part) for part in parts])
