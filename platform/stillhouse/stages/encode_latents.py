"""The stage `encode_latents`: every picture of a source, encoded once."""

from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from stillhouse.data.latents import VAE, Latents, hash_of
from stillhouse.data.pictures.pictures import Pictures
from stillhouse.errors import UserError
from stillhouse.ranges import Count
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.autoencoders import encoded, load_autoencoder
from stillhouse.students.few_step_pipeline import decoded
from stillhouse.tracking.work import WorkProgress


@dataclass(frozen=True, kw_only=True)
class EncodeLatents:
    """Write the latents of every split, and the autoencoder that made them.

    Attributes:
        source: node of a function that returns `Pictures`.
        path: the autoencoder, a folder of diffusers or an id of the hub.
        subfolder: where it lies in a whole pipeline, such as `vae`; null for the folder itself.
        revision: of the hub; null for the newest.
        batch_size: pictures at a time.
    """

    source: dict[str, Any]
    path: str
    subfolder: str | None = None
    revision: str | None = None
    batch_size: Count

    def __call__(self, context: StageContext) -> StageResult:
        """Encode all splits."""
        key = f"stages.{context.name}"
        source: Pictures = instantiate(self.source)
        autoencoder = load_autoencoder(
            self.path, key=f"{key}.path", subfolder=self.subfolder, revision=self.revision
        )
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        autoencoder = autoencoder.to(device)
        count = sum(len(samples) for samples in source.splits.values())
        values: dict[str, Tensor] = {}
        with WorkProgress(context.name, count, "pictures", context.console) as progress:
            for split, samples in source.splits.items():
                _check(samples.values, autoencoder, key)
                parts: list[Tensor] = []
                for part in samples.values.split(self.batch_size):
                    parts.append(encoded(autoencoder, part.to(device)).float().cpu())
                    progress.advance(len(part))
                values[split] = torch.cat(parts)
                _check_size(samples.values, parts[0][:1], autoencoder, key)
        pictures = {split: hash_of(samples.values) for split, samples in source.splits.items()}
        latents = Latents(context.output, values, pictures)
        latents.write()
        autoencoder.to("cpu").save_pretrained(context.output / VAE)
        channels, height, width = values["train"].shape[1:]
        return StageResult(
            metrics={"pictures": count, "channels": channels, "height": height, "width": width}
        )


def _check_size(pixels: Tensor, latents: Tensor, autoencoder: Any, key: str) -> None:
    """Refuse pictures that come back of another size.

    Raises:
        UserError: naming both.
    """
    shape, back = pixels.shape[2:], decoded(autoencoder, latents).shape[2:]
    if shape != back:
        sizes = [" x ".join(map(str, size)) for size in (shape, back)]
        raise UserError(
            f"{key}.source: pictures of {sizes[0]} come back as {sizes[1]}; set "
            "data.source.image_size to a multiple of what the autoencoder shrinks by"
        )


def _check(pixels: Tensor, autoencoder: Any, key: str) -> None:
    """Refuse what the autoencoder does not read.

    Raises:
        UserError: for points, and for another number of channels.
    """
    channels = autoencoder.config.get("in_channels", 3)
    if pixels.ndim != 4 or pixels.shape[1] != channels:
        shape = " x ".join(map(str, pixels.shape[1:]))
        raise UserError(
            f"{key}.source: its samples are {shape}; the autoencoder reads pictures of {channels} "
            "channels; expected data.source.mode=rgb for 3"
        )
