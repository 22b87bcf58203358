"""Text-to-image networks of the hub: read out of a pipeline of diffusers, and what they predict."""

import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SanaTransformer2DModel
from torch import nn

from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError

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
    place = Path(path).expanduser()
    place = str(place) if place.is_dir() else path
    try:
        with warnings.catch_warnings():
            # diffusers' own use of the hub's client.
            warnings.filterwarnings("ignore", message="The `local_dir_use_symlinks` argument")
            index: Any = DiffusionPipeline.load_config(place, revision=revision)
            if "few_step_pipeline" in index.get("_class_name", ""):
                raise UserError(f"{where}: it has been taken over; expected teacher.path={path}")
            names = {part: index[part][1] for part in set(NETWORKS.values()) & set(index)}
            name = next(iter(names.values()), "no network")
            part = NETWORKS.get(name)
            if part is None:
                raise UserError(
                    f"{where}: the pipeline has {name}; expected one of {', '.join(NETWORKS)}"
                )
            version = {"revision": revision, "subfolder": part}
            kind: Any = getattr(diffusers, name)
            model = kind.from_pretrained(place, torch_dtype=torch.float32, **version)
            scheduler: Any = None
            if part == "unet":
                version["subfolder"] = "scheduler"
                scheduler = DDPMScheduler.from_pretrained(place, **version)
    except UserError:
        raise
    except Exception as error:  # the libraries below raise whatever a broken file makes them
        raise UserError(f"{where}: no pipeline can be loaded: {one_line(error)}") from error
    predicted = "epsilon" if scheduler is None else scheduler.config["prediction_type"]
    if predicted not in PREDICTED:
        raise UserError(
            f"{where}: its scheduler says prediction_type={predicted}; expected one of "
            f"{', '.join(PREDICTED)}"
        )
    return model, scheduler


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
