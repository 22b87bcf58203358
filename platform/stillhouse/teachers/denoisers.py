"""Teachers of the family `timestep`: a generator of an earlier stage, or one that is known."""

from typing import TypeVar

from torch import nn

from stillhouse.data.images import ImageData
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.errors import UserError
from stillhouse.students.denoiser_folders import check_shape, load_denoiser
from stillhouse.students.denoisers import Denoiser

M = TypeVar("M", bound=nn.Module)


def denoiser(data: ImageData, *, path: str) -> Denoiser:
    """Return a frozen generator.

    Args:
        data: of the stage that it teaches.
        path: a pipeline's folder.

    Raises:
        UserError: for a folder without such a pipeline, and data of another shape.
    """
    found = load_denoiser(path, key="teacher.path")
    check_shape(found, data, key="teacher.path", path=path)
    return frozen(found)


def gaussian_mixture(data: ImageData, *, mixture: GaussianMixture) -> GaussianMixture:
    """Return the exact answers for points of a mixture.

    Args:
        data: of the stage that it teaches.
        mixture: of `data.pictures.mixtures`.

    Raises:
        UserError: for data of another shape.
    """
    if data.image_shape != tuple(mixture.means.shape[1:]):
        raise UserError(
            f"teacher.mixture: its points have {mixture.means.shape[1]} coordinates, samples of "
            f"data the shape {data.image_shape}; expected data=gaussian_mixture"
        )
    return frozen(mixture)


def frozen(network: M) -> M:
    """Return the network without gradients, in eval mode."""
    return network.requires_grad_(False).eval()
