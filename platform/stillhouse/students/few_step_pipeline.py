"""A pipeline for a flow or consistency model, without the project that trained it.

It needs torch, numpy, PIL and diffusers, and transformers where prompts are read.

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipeline(class_labels=[3, 3, 7], num_inference_steps=2).images
    images = pipeline(prompt=["red apple"], num_inference_steps=2).images      told captions

The network predicts the velocity v of x_s = (1 - s) x_0 + s ε, and is read on TrigFlow's path,
x_t = cos t x_0 + sin t ε, t from 0 to π/2 (2503.09641, eq. 5 to 8):

    κ = 1 / (sin t + cos t)     s = κ sin t     F = κ v(κ x_t, s) + (cos t - sin t) κ x_t

A consistency model jumps to x_0 = cos t x_t - sin t F and noises again to the next of its `times`.
Any other is integrated, x' = cos d x - sin d F, with classifier-free guidance where it is asked.
"""

import inspect
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor


@dataclass
class FewStepOutput(BaseOutput):
    """What was sampled.

    Attributes:
        images: PIL images, or a tensor for `output_type="pt"`: pixels from 0 to 1, or points.
    """

    images: list[Image.Image] | Tensor


class FewStepPipeline(DiffusionPipeline):
    """Samples a network in one step or a few.

    Args:
        transformer: the network.
        tokenizer, text_encoder: what reads prompts; None for a network that is told classes.
        vae: an autoencoder whose latents the network samples; None for pixels or points.
        times: falling times of a consistency model's longest schedule by number of steps, as
            {"1": [...], "2": [...]}; empty for a flow.
        mean, std: of the data's values, by which they were normalised; a number, or one a channel.
        guidance_scale: the default.
        classes: names of the classes.
        unconditional: whether the network knows samples of no class, as guidance needs them.
    """

    _optional_components = ("tokenizer", "text_encoder", "vae")

    def __init__(
        self,
        transformer: Any,
        tokenizer: Any = None,
        text_encoder: Any = None,
        vae: Any = None,
        times: dict[str, list[float]] | None = None,
        mean: float | list[float] = 0.0,
        std: float | list[float] = 1.0,
        guidance_scale: float = 1.0,
        classes: list[str] | None = None,
        unconditional: bool = True,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, tokenizer=tokenizer, text_encoder=text_encoder, vae=vae
        )
        self.register_to_config(
            times=times or {},
            mean=mean,
            std=std,
            guidance_scale=guidance_scale,
            classes=classes,
            unconditional=unconditional,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str] | str | None = None,
        class_labels: Sequence[int] | int | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        num_images: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
    ) -> FewStepOutput:
        """Return samples.

        Args:
            prompt: a caption of each image, for a network that is told captions; None for any.
            class_labels: of each image, for one that is told classes; None for any.
            prompt_embeds, prompt_attention_mask: captions [B, L, D] and [B, L] in the place of
                `prompt`, as `embedded` returns them.
            num_images: how many, where neither labels nor captions say it; 1 by default.
            num_inference_steps: 1 by default for a consistency model, 50 for a flow.
            guidance_scale: 1 is none. A consistency model was told its scale in training, or has
                it built in.
            generator: on the CPU, of all noise.
            latents: the first noise.
            output_type: `pil` or `pt`.
        """
        settings: Any = self.config
        labels = None if class_labels is None else torch.as_tensor(class_labels).view(-1)
        if prompt is not None:
            if self.text_encoder is None:
                raise ValueError("prompt: the network is told classes; expected class_labels")
            texts = [prompt] if isinstance(prompt, str) else list(prompt)
            prompt_embeds, prompt_attention_mask = embedded(
                self.tokenizer, self.text_encoder, texts
            )
        some = labels if labels is not None else prompt_embeds
        if some is None:
            some = torch.zeros(num_images or 1)
        count, device = len(some), self._execution_device
        x = latents if latents is not None else self._noise(count, generator)
        x = x.to(device)
        scale = settings.guidance_scale if guidance_scale is None else guidance_scale
        if not settings.times and scale != 1 and not settings.unconditional:
            raise ValueError(
                f"guidance_scale={scale}: the network knows no samples without a class; expected 1"
            )
        condition = {
            "class_labels": None if labels is None else labels.to(device),
            "encoder_hidden_states": None if prompt_embeds is None else prompt_embeds.to(device),
            "encoder_attention_mask": (
                None if prompt_attention_mask is None else prompt_attention_mask.to(device)
            ),
        }
        if settings.times:
            steps = 1 if num_inference_steps is None else num_inference_steps
            x = self._jump(x, self._times(steps), condition, scale, generator)
        else:
            x = self._integrate(x, num_inference_steps or 50, condition, scale)
        return FewStepOutput(images=self._decoded(x, output_type))

    def _times(self, steps: int) -> list[float]:
        known = self.config["times"]
        if str(steps) not in known:
            raise ValueError(
                f"num_inference_steps={steps}: expected {' or '.join(known)}, whose times are known"
            )
        return known[str(steps)]

    def _jump(
        self,
        x: Tensor,
        times: list[float],
        condition: dict[str, Tensor | None],
        scale: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        start = x
        for step, t in enumerate(self._shown(times)):
            if step > 0:
                fresh = self._noise(len(x), generator).to(x.device)
                start = math.cos(t) * x + math.sin(t) * fresh
            guidance = torch.full((len(x),), scale, device=x.device)
            F = self._velocity(start, t, condition, guidance)
            x = math.cos(t) * start - math.sin(t) * F
        return x

    def _integrate(
        self, x: Tensor, steps: int, condition: dict[str, Tensor | None], scale: float
    ) -> Tensor:
        times = [math.pi / 2 * (steps - i) / steps for i in range(steps)]
        for t in self._shown(times):
            F = self._velocity(x, t, condition)
            if scale != 1:
                none = dict.fromkeys(condition)
                F = torch.lerp(self._velocity(x, t, none), F, scale)
            d = math.pi / 2 / steps
            x = math.cos(d) * x - math.sin(d) * F
        return x

    def _shown(self, times: list[float]) -> Iterable[float]:
        bar: Any = self.progress_bar
        return bar(times)

    def _velocity(
        self,
        x: Tensor,
        t: float,
        condition: dict[str, Tensor | None],
        guidance: Tensor | None = None,
    ) -> Tensor:
        cos, sin = math.cos(t), math.sin(t)
        scale = 1 / (sin + cos)
        s = torch.full((len(x),), scale * sin, dtype=torch.float64, device=x.device)
        taken = inspect.signature(self.transformer.forward).parameters
        said = {**condition, "guidance": guidance}
        known = self.transformer.config.get("num_class_embeds")
        if known is not None:
            # diffusers' UNet2DModel has no class for none: its last one stands for it.
            labels = condition["class_labels"]
            none = torch.full((len(x),), known - 1, device=x.device)
            said["class_labels"] = none if labels is None else labels.where(labels >= 0, none)
        v = self.transformer(
            (scale * x).to(self.transformer.dtype),
            s,
            **{name: value for name, value in said.items() if name in taken},
        ).sample
        return scale * v + (cos - sin) * scale * x

    def _noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        network = self.transformer.config
        side = network.get("sample_size")
        shape = (network["in_channels"],) if side is None else (network["in_channels"], side, side)
        return torch.randn(count, *shape, generator=generator)

    def _decoded(self, x: Tensor, output_type: str) -> list[Image.Image] | Tensor:
        shape = (1, -1, *[1] * (x.ndim - 2))
        mean, std = (torch.tensor(self.config[name]).view(shape) for name in ("mean", "std"))
        x = x.cpu() * std + mean
        if self.vae is not None:
            x = decoded(self.vae, x)
        if x.ndim == 2 or output_type == "pt":
            return x
        pixels = (255 * x.clamp(0, 1)).round().byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(np.squeeze(image)) for image in pixels]


@torch.no_grad()
def embedded(tokenizer: Any, text_encoder: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the last states of texts [B, L, D], and where they are tokens [B, L].

    Args:
        tokenizer: whose `model_max_length` cuts.
        text_encoder: a model of transformers.
        texts: B of them.
    """
    read = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    ids, mask = (read[name].to(text_encoder.device) for name in ("input_ids", "attention_mask"))
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return states, mask.bool()


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Return pixels from 0 to 1 of latents [B, D, S, T]: [B, C, H, W].

    Args:
        vae: an autoencoder of diffusers.
        latents: as its encoder makes them, without a scale.
    """
    found = vae.decode(latents.to(vae.device, vae.dtype)).sample
    return (0.5 + 0.5 * found).clamp(0, 1).float().cpu()
