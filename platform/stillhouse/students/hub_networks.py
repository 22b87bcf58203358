"""Text-to-image networks of the hub: read out of a pipeline of diffusers, and what they predict."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SanaTransformer2DModel
from torch import nn

from stillhouse.errors import UserError
from stillhouse.students.causal_lm import loading
from stillhouse.students.few_step_pipeline import FewStepPipeline

# Those that `few_step_pipeline.called` calls, by the name of their part in a pipeline.
NETWORKS = {
    "UNet2DConditionModel": "unet",
    "SanaTransformer2DModel": "transformer",
    "WanTransformer3DModel": "transformer",
}
# What a network with levels of noise may predict, as its scheduler names it.
PREDICTED = ("epsilon", "v_prediction")


def network_of(path: str, *, revision: str | None, key: str) -> tuple[nn.Module, Any]:
    """Return the network of a pipeline in float32, and its scheduler, None for a rectified flow.

    Args:
        path: the folder of a pipeline of diffusers, or an id of the hub.
        revision: of the hub.
        key: where the path stands in the config.

    Raises:
        UserError: for what is none, for a network that is not known here, and for one that predicts
            something else than ε or v.
    """
    where = f"{key}={path}"
    folder = Path(path).expanduser()
    place = str(folder) if folder.is_dir() else path
    with _loading(where):
        index: Any = DiffusionPipeline.load_config(place, revision=revision)
    if FewStepPipeline.__name__ in index["_class_name"]:
        raise UserError(f"{where}: it has been taken over; expected teacher.path={path}")
    names = [index[part][1] for part in ("unet", "transformer") if part in index]
    part = NETWORKS.get(names[0]) if names else None
    if part is None:
        raise UserError(
            f"{where}: the pipeline has {' and '.join(names) or 'no network'}; expected one of "
            f"{', '.join(NETWORKS)}"
        )
    scheduler: Any = None
    with _loading(where):
        kind: Any = getattr(diffusers, names[0])
        version = {"revision": revision, "torch_dtype": torch.float32}
        model = kind.from_pretrained(place, subfolder=part, **version)
        if part == "unet":
            scheduler = DDPMScheduler.from_pretrained(
                place, subfolder="scheduler", revision=revision
            )
    predicted = "epsilon" if scheduler is None else scheduler.config["prediction_type"]
    if predicted not in PREDICTED:
        raise UserError(
            f"{where}: its scheduler says prediction_type={predicted}; expected one of "
            f"{', '.join(PREDICTED)}"
        )
    return model, scheduler


@contextmanager
def _loading(where: str) -> Iterator[None]:
    """Tell in one line what cannot be loaded, and let diffusers' own use of the hub be."""
    with loading(where), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
        yield


def told_of_guidance(model: SanaTransformer2DModel, *, where: str) -> SanaTransformer2DModel:
    """Return SANA with an input for the scale of guidance, which has no effect before it learns.

    Raises:
        UserError: for one that is told other times than s: a student is told s.
    """
    settings = dict(model.config)
    if 1000 * settings["timestep_scale"] != 1:
        raise UserError(
            f"{where}: guidance_embeds=true needs a SANA that is told times from 0 to 1, as the "
            f"teachers of SANA-Sprint are; this one is told {1000 * settings['timestep_scale']:g} "
            "times that; expected null, and one guidance scale"
        )
    student: Any = SanaTransformer2DModel.from_config({**settings, "guidance_embeds": True})
    known = {
        name.replace("time_embed.emb.", "time_embed."): value
        for name, value in model.state_dict().items()
    }
    student.load_state_dict(known, strict=False)
    last = student.time_embed.guidance_embedder.linear_2
    with torch.no_grad():
        last.weight.zero_()
        last.bias.zero_()
    return student
