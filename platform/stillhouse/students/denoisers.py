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

from diffusers import UNet2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from stillhouse.data.images import ImageData
from stillhouse.data.latents import VAE, LatentData
from stillhouse.data.pictures.captions import TEXT_ENCODER, TOKENIZER, Captions
from stillhouse.diffusion.paths import RECTIFIED_FLOW, epsilon, flow, numbered, v
from stillhouse.diffusion.trigflow import TrigFlowView
from stillhouse.errors import UserError
from stillhouse.ranges import Count, Positive
from stillhouse.records.diffusion import Condition
from stillhouse.students import few_step_pipeline, modeling_few_step
from stillhouse.students.few_step_pipeline import called, with_empty
from stillhouse.students.modeling_few_step import PointNetwork, SmallDiT

INDEX = "model_index.json"
COMPONENT, SCHEDULER, EMPTY = "transformer", "scheduler", "empty_caption.safetensors"
OWN = {"SmallDiT": SmallDiT, "PointNetwork": PointNetwork}
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
