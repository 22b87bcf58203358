"""Autoencoders of pictures, of diffusers: pixels to latents and, by `few_step_pipeline`, back."""

import warnings
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoModel
from jaxtyping import Float
from torch import Tensor

from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError
from stillhouse.students.few_step_pipeline import reads_films

Autoencoder = Any


def load_autoencoder(
    path: str, *, key: str, subfolder: str | None = None, revision: str | None = None
) -> Autoencoder:
    """Load an autoencoder of diffusers: AutoencoderKL, AutoencoderTiny, AutoencoderDC, Wan's.

    Args:
        path: its folder, or an id of the hub.
        key: where it stands in the config.
        subfolder: of a whole pipeline's folder, such as `vae`.
        revision: of the hub.

    Raises:
        UserError: for what is none.
    """
    where = f"{key}={path}" + (f", subfolder {subfolder}" if subfolder else "")
    try:
        with warnings.catch_warnings():
            # diffusers' own use of the hub's client.
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
            place = Path(path).expanduser()
            model: Any = AutoModel.from_pretrained(
                str(place) if place.is_dir() else path, subfolder=subfolder, revision=revision
            )
    except Exception as error:  # the libraries below raise whatever a broken file makes them
        raise UserError(f"{where}: no autoencoder can be loaded: {one_line(error)}") from error
    if not hasattr(model, "encode") or not hasattr(model, "decode"):
        raise UserError(
            f"{where}: a {type(model).__name__} does not encode pictures; expected an autoencoder "
            "of diffusers, such as AutoencoderKL"
        )
    return model.eval().requires_grad_(False)


@torch.no_grad()
def encoded(autoencoder: Autoencoder, pixels: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D S T"]:
    """Return latents of pictures from 0 to 1: the mean, where the encoder says a distribution."""
    pixels = 2 * pixels - 1
    if reads_films(autoencoder):
        return autoencoder.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
    said = autoencoder.encode(pixels)
    if hasattr(said, "latent_dist"):
        return said.latent_dist.mode()
    # AutoencoderTiny and VQModel, and AutoencoderDC.
    return said.latents if hasattr(said, "latents") else said.latent
