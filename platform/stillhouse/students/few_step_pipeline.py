"""A pipeline for a flow or consistency model, without the project that trained it.

It needs torch, numpy, PIL and diffusers, and transformers where prompts are read.

    pipeline = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    images = pipeline(class_labels=[3, 3, 7], num_inference_steps=2).images
    images = pipeline(prompt=["red apple"], num_inference_steps=2).images      told captions

The network predicts the velocity v of x_s = (1 - s) x_0 + s ε, and is read on TrigFlow's path,
x_t = cos t x_0 + sin t ε, t from 0 to π/2 (2503.09641, eq. 5 to 8):

    κ = 1 / (sin t + cos t)     s = κ sin t     F = κ v(κ x_t, s) + (cos t - sin t) κ x_t

One with a `scheduler` predicts ε or v at its numbered levels of noise, and is asked at the level s,
between two of them, where ᾱ_s = cos² t; behind the last level, at its angle t':

    F = (ε(x_t, s) - sin t x_t) / cos t'        F = v(x_t, s) - sin(t - t') x_t

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
from torch.nn.functional import pad

# What a network is told besides x and the time, by the names of `diffusers`; None is nothing.
Said = dict[str, Tensor | None]
# Wan was trained on captions of so many tokens, filled up with zeros that it does not mask.
WAN_TOKENS = 512


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
        scheduler: whose levels of noise the network knows; None for a rectified flow.
        times: falling times of a consistency model's longest schedule by number of steps, as
            {"1": [...], "2": [...]}; empty for a flow.
        mean, std: of the data's values, by which they were normalised; a number, or one a channel.
        guidance_scale: the default.
        classes: names of the classes.
        unconditional: whether the network knows samples of no class, as guidance needs them.
        sample_size: height and width of what is sampled; None for the network's own.
    """

    _optional_components = ("tokenizer", "text_encoder", "vae", "scheduler")

    def __init__(
        self,
        transformer: Any,
        tokenizer: Any = None,
        text_encoder: Any = None,
        vae: Any = None,
        scheduler: Any = None,
        times: dict[str, list[float]] | None = None,
        mean: float | list[float] = 0.0,
        std: float | list[float] = 1.0,
        guidance_scale: float = 1.0,
        classes: list[str] | None = None,
        unconditional: bool = True,
        sample_size: int | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            vae=vae,
            scheduler=scheduler,
        )
        self.register_to_config(
            times=times or {},
            mean=mean,
            std=std,
            guidance_scale=guidance_scale,
            classes=classes,
            unconditional=unconditional,
            sample_size=sample_size,
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
        said = {
            "class_labels": None if labels is None else labels.to(device),
            "encoder_hidden_states": None if prompt_embeds is None else prompt_embeds.to(device),
            "encoder_attention_mask": (
                None if prompt_attention_mask is None else prompt_attention_mask.to(device)
            ),
        }
        none: Said = dict.fromkeys(said)
        if reads_empty_prompts(self.transformer):
            empty = embedded(self.tokenizer, self.text_encoder, [""])[0][0].to(device)
            said, none = (with_empty(each, empty, count) for each in (said, none))
        if settings.times:
            steps = 1 if num_inference_steps is None else num_inference_steps
            x = self._jump(x, self._times(steps), said, scale, generator)
        else:
            x = self._integrate(x, num_inference_steps or 50, said, none, scale)
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
        said: Said,
        scale: float,
        generator: torch.Generator | None,
    ) -> Tensor:
        start = x
        for step, t in enumerate(self._shown(times)):
            if step > 0:
                fresh = self._noise(len(x), generator).to(x.device)
                start = math.cos(t) * x + math.sin(t) * fresh
            guidance = torch.full((len(x),), scale, device=x.device)
            F = self._velocity(start, t, {**said, "guidance": guidance})
            x = math.cos(t) * start - math.sin(t) * F
        return x

    def _integrate(self, x: Tensor, steps: int, said: Said, none: Said, scale: float) -> Tensor:
        times = [math.pi / 2 * (steps - i) / steps for i in range(steps)]
        for t in self._shown(times):
            F = self._velocity(x, t, said)
            if scale != 1:
                F = torch.lerp(self._velocity(x, t, none), F, scale)
            d = math.pi / 2 / steps
            x = math.cos(d) * x - math.sin(d) * F
        return x

    def _shown(self, times: list[float]) -> Iterable[float]:
        bar: Any = self.progress_bar
        return bar(times)

    def _velocity(self, x: Tensor, t: float, said: Said) -> Tensor:
        ones = torch.ones(len(x), dtype=torch.float64, device=x.device)
        dtype = self.transformer.dtype
        if self.scheduler is None:
            cos, sin = math.cos(t), math.sin(t)
            scale = 1 / (sin + cos)
            v = called(self.transformer, (scale * x).to(dtype), scale * sin * ones, said)
            return scale * v + (cos - sin) * scale * x
        level, last = level_of(self.scheduler.alphas_cumprod, t)
        output = called(self.transformer, x.to(dtype), level * ones, said)
        if self.scheduler.config["prediction_type"] == "epsilon":
            return (output - math.sin(t) * x) / math.cos(last)
        return output - math.sin(t - last) * x

    def _noise(self, count: int, generator: torch.Generator | None) -> Tensor:
        network = self.transformer.config
        side = self.config["sample_size"] or network.get("sample_size")
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


def called(model: Any, x: Tensor, time: Tensor, said: Said) -> Tensor:
    """Call a network of diffusers as it was trained to be called.

    Args:
        model: of `SmallDiT`, `PointNetwork`, `UNet2DModel`, `UNet2DConditionModel`,
            `SanaTransformer2DModel` and `WanTransformer3DModel`, the last as one of still pictures.
        x: noisy samples [B, ...].
        time: [B], from 0 to 1, or a level of noise.
        said: `class_labels` [B], `encoder_hidden_states` [B, L, D] with `encoder_attention_mask`
            [B, L], and `guidance` [B]; what the network does not read is left out.
    """
    settings = model.config
    taken = inspect.signature(model.forward).parameters
    told = {name: value for name, value in said.items() if name in taken}
    known = settings.get("num_class_embeds")
    if known is not None:
        # diffusers' UNet2DModel has no class for none: its last one stands for it.
        labels, none = told["class_labels"], torch.full((len(x),), known - 1, device=x.device)
        told["class_labels"] = none if labels is None else labels.where(labels >= 0, none)
    if "timestep_scale" in settings:
        # SANA; its students in few steps are told s itself, and how strongly they are guided.
        guided = settings["guidance_embeds"]
        time = time if guided else 1000 * settings["timestep_scale"] * time
        strength = told.pop("guidance", None)
        if guided:
            assert strength is not None
            told["guidance"] = settings["guidance_embeds_scale"] * strength
    if "text_dim" not in settings:
        return model(x, timestep=time, **told).sample
    states = told["encoder_hidden_states"]
    assert states is not None
    told["encoder_hidden_states"] = pad(states, (0, 0, 0, WAN_TOKENS - states.shape[1]))
    return model(x[:, :, None], timestep=1000 * time, **told).sample[:, :, 0]


def reads_empty_prompts(model: Any) -> bool:
    """Whether a network is told the empty caption where there is none, and knows nothing else."""
    return "cross_attention_dim" in model.config or "text_dim" in model.config


def with_empty(said: Said, empty: Tensor, count: int) -> Said:
    """Return what is said with the empty caption where no caption is said.

    Args:
        said: as `called` takes it; samples without a caption have an empty mask.
        empty: states of the empty caption [L, D].
        count: B.
    """
    states, mask = said["encoder_hidden_states"], said["encoder_attention_mask"]
    if states is None or mask is None:
        states = empty.new_zeros(count, len(empty), empty.shape[1])
        mask = torch.zeros(states.shape[:2], dtype=torch.bool, device=empty.device)
    more = max(0, len(empty) - states.shape[1])
    states, mask = pad(states, (0, 0, 0, more)), pad(mask, (0, more))
    rest = mask.shape[1] - len(empty)
    none = ~mask.any(1)
    filled = pad(empty, (0, 0, 0, rest)).to(states.dtype)
    seen = torch.arange(mask.shape[1], device=mask.device) < len(empty)
    return {
        **said,
        "encoder_hidden_states": torch.where(none[:, None, None], filled, states),
        "encoder_attention_mask": torch.where(none[:, None], seen, mask),
    }


def level_of(alphas_cumprod: Tensor, t: float) -> tuple[float, float]:
    """Return the level at the angle t, between two of them where log ᾱ is linear, and its angle.

    Clean data are one step before the first level; behind the last there is none.
    """
    logs = [0.0, *alphas_cumprod.double().log().tolist()]
    wanted = max(math.log1p(-(math.sin(t) ** 2)) if t < math.pi / 2 else -math.inf, logs[-1])
    below = min(sum(log > wanted for log in logs), len(logs) - 1) or 1
    level = below - 2 + (wanted - logs[below - 1]) / (logs[below] - logs[below - 1])
    return max(level, 0.0), math.acos(math.exp(wanted / 2))


@torch.no_grad()
def embedded(tokenizer: Any, text_encoder: Any, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Return the last states of texts [B, L, D], and where they are tokens [B, L].

    Args:
        tokenizer: whose `model_max_length` cuts.
        text_encoder: a model of transformers.
        texts: B of them.
    """
    # What conditions on CLIP was trained to read its padding too.
    fills = text_encoder.config.model_type == "clip_text_model"
    padding = "max_length" if fills else True
    read = tokenizer(list(texts), padding=padding, truncation=True, return_tensors="pt")
    ids, mask = (read[name].to(text_encoder.device) for name in ("input_ids", "attention_mask"))
    if fills:
        mask = torch.ones_like(mask)
    states = text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return states, mask.bool()


def reads_films(vae: Any) -> bool:
    """Whether an autoencoder has an axis of time, as Wan's."""
    return "temperal_downsample" in vae.config


@torch.no_grad()
def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Return pixels from 0 to 1 of latents [B, D, S, T]: [B, C, H, W].

    Args:
        vae: an autoencoder of diffusers; one of films sees a picture as a film of one.
        latents: as its encoder makes them, without a scale.
    """
    latents = latents.to(vae.device, vae.dtype)
    films = reads_films(vae)
    found = vae.decode(latents[:, :, None] if films else latents).sample
    found = found[:, :, 0] if films else found
    return (0.5 + 0.5 * found).clamp(0, 1).float().cpu()
