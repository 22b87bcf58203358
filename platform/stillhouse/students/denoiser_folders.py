"""Folders of pipelines: the networks that `students.denoisers` has written to them, read again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file

from stillhouse.data.images import ImageData
from stillhouse.data.latents import VAE
from stillhouse.data.pictures.captions import TEXT_ENCODER, TOKENIZER
from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.errors import UserError
from stillhouse.students.autoencoders import load_autoencoder
from stillhouse.students.denoisers import COMPONENT, EMPTY, INDEX, OWN, SCHEDULER, Denoiser
from stillhouse.students.few_step_pipeline import FewStepPipeline
from stillhouse.students.hub_networks import NETWORKS, told_of_guidance
from stillhouse.students.text_encoders import load_text_encoder

KNOWN = (*OWN, UNet2DModel.__name__, *NETWORKS)


def pretrained(data: ImageData, *, path: str, guidance_embeds: bool | None = None) -> Denoiser:
    """Return the network of a pipeline's folder, as a few-step student begins from its teacher.

    Args:
        data: of the stage.
        path: a folder that `Denoiser.save` wrote.
        guidance_embeds: true gives it an input for the scale of guidance, which has no effect
            before it is trained; null leaves it as it is.

    Raises:
        UserError: for a folder without such a pipeline, and data of another shape.
    """
    denoiser = load_denoiser(path, key="student.path", guidance_embeds=guidance_embeds)
    check_shape(denoiser, data, key="student.path", path=path)
    return denoiser


def load_denoiser(path: str, *, key: str, guidance_embeds: bool | None = None) -> Denoiser:
    """Return the network of a pipeline's folder.

    Args:
        path: the folder.
        key: where it stands in the config.
        guidance_embeds: as in `pretrained`.

    Raises:
        UserError: for a folder without such a pipeline.
    """
    index = pipeline_index(path, key=key)
    folder = Path(path).expanduser()
    name = index[COMPONENT][1]
    kind: Any = OWN[name] if name in OWN else getattr(diffusers, name)
    model = kind.from_pretrained(folder / COMPONENT)
    if guidance_embeds and not model.config.get("guidance_embeds", False):
        model = _told_of_guidance(model, where=f"{key}={path}")
    return Denoiser(
        model,
        unconditional=bool(index["unconditional"]),
        scheduler=(
            DDPMScheduler.from_pretrained(folder / SCHEDULER) if SCHEDULER in index else None
        ),
        empty=load_file(folder / EMPTY)["states"] if (folder / EMPTY).is_file() else None,
        sample_size=index.get("sample_size"),
    )


def _told_of_guidance(model: Any, *, where: str) -> Any:
    """Return the network with an input for the scale of guidance.

    Raises:
        UserError: for one that has no such input.
    """
    name = type(model).__name__
    if "guidance_embeds" not in model.config:
        raise UserError(
            f"student.guidance_embeds=true: the {name} of {where} has no such input; expected "
            "null, and one guidance scale"
        )
    if name not in OWN:
        return told_of_guidance(model, where=where)
    student: Any = OWN[name].from_config({**model.config, "guidance_embeds": True})
    # What the model does not have begins at 0, as the new network made it.
    student.load_state_dict(model.state_dict(), strict=False)
    return student


def load_pipeline(path: str, *, key: str) -> FewStepPipeline:
    """Return the pipeline of a folder, by this project's own code and not by the folder's.

    Raises:
        UserError: for a folder without such a pipeline.
    """
    index = pipeline_index(path, key=key)
    names = ("times", "mean", "std", "guidance_scale", "classes", "unconditional", "sample_size")
    settings: dict[str, Any] = {name: index.get(name) for name in names}
    if TEXT_ENCODER in index:
        folder = Path(path).expanduser()
        settings[TOKENIZER] = load_tokenizer(str(folder / TOKENIZER), key=key)
        settings[TEXT_ENCODER] = load_text_encoder(str(folder / TEXT_ENCODER), key=key)
    if VAE in index:
        settings[VAE] = load_autoencoder(str(Path(path).expanduser() / VAE), key=key)
    denoiser = load_denoiser(path, key=key)
    return FewStepPipeline(denoiser.model.eval(), scheduler=denoiser.scheduler, **settings)


def pipeline_index(path: str, *, key: str) -> Mapping[str, Any]:
    """Return a pipeline's `model_index.json`.

    Raises:
        UserError: where there is none, or one of another kind.
    """
    file = Path(path).expanduser() / INDEX
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={path}: no {INDEX} can be read there; expected the model folder of a run of "
            "the family timestep"
        ) from error
    name = index.get(COMPONENT, ["", ""])[1]
    kind = index.get("_class_name")
    if isinstance(kind, str) and kind != FewStepPipeline.__name__:
        raise UserError(
            f"{key}={path}: a {kind} of diffusers; take its network over with a stage of "
            f"conf/stage/take_denoiser.yaml, and name {key}=${{artifact:<stage>}}"
        )
    if name not in KNOWN:
        raise UserError(
            f"{key}={path}: its network is {name or 'missing'}; expected one of {', '.join(KNOWN)}"
        )
    return index


def check_shape(denoiser: Denoiser, data: ImageData, *, key: str, path: str) -> None:
    """Refuse a network for samples of another shape, or for captions of another width.

    Raises:
        UserError: naming both.
    """
    if denoiser.sample_shape != data.image_shape:
        raise UserError(
            f"{key}={path}: its samples are {' x '.join(map(str, denoiser.sample_shape))}, those "
            f"of data are {' x '.join(map(str, data.image_shape))}"
        )
    width = denoiser.caption_width
    if width != data.caption_width:
        raise UserError(
            f"{key}={path}: its captions are {width} wide, those of data {data.caption_width}; 0 "
            "is none; expected data.captions_path as it was trained with"
        )
