"""Generators: models of diffusers as networks on TrigFlow's path, made, loaded and handed on.

A builder is called with (data) and returns a `Denoiser`. What is handed on is a folder that
diffusers reads as a pipeline, without this project: the network, and the code of both beside them.

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DDPMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from stillhouse.data.images import ImageData
from stillhouse.data.latents import VAE, LatentData
from stillhouse.data.pictures.captions import TEXT_ENCODER, TOKENIZER, Captions
from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.diffusion.paths import RECTIFIED_FLOW, epsilon, flow, numbered, v
from stillhouse.diffusion.trigflow import TrigFlowView
from stillhouse.errors import UserError
from stillhouse.ranges import Count, Positive
from stillhouse.records.diffusion import Condition
from stillhouse.students import few_step_pipeline, modeling_few_step
from stillhouse.students.autoencoders import load_autoencoder
from stillhouse.students.few_step_pipeline import FewStepPipeline, called, with_empty
from stillhouse.students.hub_networks import NETWORKS, told_of_guidance
from stillhouse.students.modeling_few_step import PointNetwork, SmallDiT
from stillhouse.students.text_encoders import load_text_encoder

INDEX = "model_index.json"
COMPONENT, SCHEDULER, EMPTY = "transformer", "scheduler", "empty_caption.safetensors"
OWN = {"SmallDiT": SmallDiT, "PointNetwork": PointNetwork}
KNOWN = (*OWN, UNet2DModel.__name__, *NETWORKS)
# The width of captions in the configs of networks, the first that there is.
CAPTION_WIDTHS = ("caption_width", "caption_channels", "text_dim", "cross_attention_dim")
PREDICTIONS = {"epsilon": epsilon, "v_prediction": v}


class Denoiser(TrigFlowView):
    """A model of diffusers that predicts the velocity of a rectified flow, as F on TrigFlow's path.

    Args:
        model: of diffusers.
        unconditional: whether it knows samples of which nothing is said, as guidance needs them.
        scheduler: of diffusers, for a model that predicts ε or v at its levels of noise; None for
            a rectified flow.
        empty: states of the empty caption [L, D], for a model of the hub, which is told it where
            there is none.
        sample_size: height and width of its samples; None for the model's own.

    Attributes:
        model, unconditional, scheduler, empty, sample_size: the same.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        unconditional: bool = True,
        scheduler: Any = None,
        empty: Tensor | None = None,
        sample_size: int | None = None,
    ) -> None:
        called = _Called(model, empty)
        if scheduler is None:
            super().__init__(called, RECTIFIED_FLOW, flow)
        else:
            prediction = PREDICTIONS[scheduler.config["prediction_type"]]
            super().__init__(called, numbered(scheduler.alphas_cumprod), prediction)
        self.unconditional = unconditional
        self.empty = empty
        self.scheduler = scheduler
        self.sample_size = sample_size

    @property
    def model(self) -> Any:
        """The model of diffusers."""
        return self.network.model

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(C, H, W), or (D,) of points."""
        settings = self.model.config
        side = self.sample_size or settings.get("sample_size")
        return (settings["in_channels"], *([] if side is None else [side, side]))

    @property
    def caption_width(self) -> int:
        """Width of the captions that it reads; 0 for none."""
        found = [self.model.config.get(name) for name in CAPTION_WIDTHS]
        return next((width for width in found if width), 0)

    def save(
        self,
        folder: Path,
        data: ImageData,
        *,
        times: Mapping[str, Sequence[float]],
        guidance_scale: float,
    ) -> None:
        """Write a pipeline.

        Args:
            folder: where to.
            data: whose mean, deviation, classes, encoder of captions and autoencoder the pipeline
                keeps.
            times: of a consistency model, by number of steps; empty for a flow.
            guidance_scale: its default.
        """
        own = type(self.model).__name__ in OWN
        self.model.save_pretrained(folder / COMPONENT)
        if own:
            shutil.copy(modeling_few_step.__file__, folder / COMPONENT / "modeling_few_step.py")
        shutil.copy(few_step_pipeline.__file__, folder / "few_step_pipeline.py")
        library = "modeling_few_step" if own else "diffusers"
        index = {
            "_class_name": ["few_step_pipeline", "FewStepPipeline"],
            "_diffusers_version": self.model.config["_diffusers_version"],
            COMPONENT: [library, type(self.model).__name__],
            "times": {steps: list(values) for steps, values in times.items()},
            "mean": data.mean,
            "std": data.std,
            "guidance_scale": guidance_scale,
            "classes": list(data.told_classes),
            "unconditional": self.unconditional,
            "sample_size": self.sample_size,
        }
        if self.empty is not None:
            save_file({"states": self.empty.contiguous()}, folder / EMPTY)
        if self.scheduler is not None:
            self.scheduler.save_pretrained(folder / SCHEDULER)
            index[SCHEDULER] = ["diffusers", type(self.scheduler).__name__]
        if data.captions is not None:
            index |= copied_encoder(data.captions, folder)
        if isinstance(data, LatentData):
            shutil.copytree(data.latents.folder / VAE, folder / VAE)
            index[VAE] = ["diffusers", type(data.latents.autoencoder).__name__]
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Called(nn.Module):
    """Calls a model of diffusers by its own names."""

    def __init__(self, model: nn.Module, empty: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.empty = None if empty is None else nn.Buffer(empty, persistent=False)

    def forward(
        self, x: Tensor, s: Tensor, condition: Condition, guidance_scale: Tensor | None
    ) -> Tensor:
        said = {
            "class_labels": condition.labels,
            "encoder_hidden_states": condition.embeddings,
            "encoder_attention_mask": condition.mask,
            "guidance": guidance_scale,
        }
        if self.empty is not None:
            said = with_empty(said, self.empty, len(x))
        # Cleaner than a scheduler's first level is its first level.
        return called(self.model, x, s.clamp(min=0), said)


def small_dit(
    data: ImageData,
    *,
    patch_size: Count,
    width: Count,
    num_layers: Count,
    num_attention_heads: Count,
    mlp_ratio: Positive,
    guidance_embeds: bool,
    unconditional: bool = True,
) -> Denoiser:
    """Return a new `SmallDiT` for the data's shape and conditions.

    Args:
        data: the images.
        patch_size: a divisor of their side.
        width: a multiple of 4 and of the heads.
        num_layers, num_attention_heads, mlp_ratio, guidance_embeds, unconditional: as in
            `SmallDiT`.

    Raises:
        UserError: for images that are no squares of patches, and a width that does not divide.
    """
    channels, height, width_of_image = data.image_shape
    if height != width_of_image or height % patch_size:
        raise UserError(
            f"student.patch_size={patch_size}: expected a divisor of the side of square images; "
            f"data.source.image_size makes them {height} x {width_of_image}"
        )
    if width % 4 or width % num_attention_heads:
        raise UserError(
            f"student.width={width}, student.num_attention_heads={num_attention_heads}: expected a "
            "multiple of 4 and of the heads"
        )
    return Denoiser(
        SmallDiT(
            sample_size=height,
            in_channels=channels,
            patch_size=patch_size,
            width=width,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            mlp_ratio=mlp_ratio,
            num_classes=len(data.told_classes),
            caption_width=data.caption_width,
            guidance_embeds=guidance_embeds,
            unconditional=unconditional,
        ),
        unconditional=unconditional,
    )


def point_network(
    data: ImageData,
    *,
    width: Count,
    num_layers: Count,
    guidance_embeds: bool,
    unconditional: bool = True,
) -> Denoiser:
    """Return a new `PointNetwork` for points.

    Args:
        data: the points.
        width, num_layers, guidance_embeds, unconditional: as in `PointNetwork`.

    Raises:
        UserError: for images.
    """
    if len(data.image_shape) != 1:
        raise UserError("student: a point network takes points; expected student=small_dit")
    return Denoiser(
        PointNetwork(
            in_channels=data.image_shape[0],
            width=width,
            num_layers=num_layers,
            num_classes=len(data.classes),
            guidance_embeds=guidance_embeds,
            unconditional=unconditional,
        ),
        unconditional=unconditional,
    )


def unet(
    data: ImageData,
    *,
    widths: Sequence[int],
    layers_per_block: Count,
    norm_num_groups: Count,
    unconditional: bool = True,
) -> Denoiser:
    """Return a new `UNet2DModel` of diffusers; it attends at its lowest resolution.

    Args:
        data: images without captions.
        widths: channels of each resolution, multiples of the groups.
        layers_per_block, norm_num_groups: as in `UNet2DModel`.
        unconditional: as in `SmallDiT`.

    Raises:
        UserError: for captions, which it does not read.
    """
    if data.caption_width:
        raise UserError("student: a UNet2DModel reads no captions; expected student=small_dit")
    channels, side, _ = data.image_shape
    plain = len(widths) - 1
    model = UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(widths),
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        down_block_types=(*["DownBlock2D"] * plain, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * plain),
        num_class_embeds=len(data.classes) + unconditional if data.classes else None,
    )
    return Denoiser(model, unconditional=unconditional)


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


def copied_encoder(captions: Captions, folder: Path) -> Mapping[str, Sequence[str]]:
    """Copy the encoder of captions into a pipeline's folder; return its part of the index."""
    for name in (TEXT_ENCODER, TOKENIZER):
        shutil.copytree(captions.folder / name, folder / name)
    settings = [
        json.loads((folder / file).read_text())
        for file in (f"{TEXT_ENCODER}/config.json", f"{TOKENIZER}/tokenizer_config.json")
    ]
    return {
        TEXT_ENCODER: ["transformers", settings[0]["architectures"][0]],
        TOKENIZER: ["transformers", settings[1]["tokenizer_class"]],
    }


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
