"""Small generators of images and of points, as diffusers models.

`SmallDiT` is a diffusion transformer (2212.09748) with RMS-normalised queries and keys and an
embedding of time whose frequencies stay low, so that its derivative in time stays small
(2410.11081, Sec. 4.1): at frequencies up to 32 consistency training diverged for some seeds.
`PointNetwork` is an MLP for data without a shape. Both are told the class or the embedded caption
of a sample, or nothing, and, where they were distilled from a guided teacher, how strongly it was
guided: an input that begins without an effect.

This file stands alone: it is saved beside the weights, and needs torch and diffusers only.

Shape legend: B batch, C channels, N tokens, D width, L tokens of a caption.
"""

import math

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, rms_norm, scaled_dot_product_attention, silu

FREQUENCIES = 32


def sinusoids(values: Tensor, width: int) -> Tensor:
    """Return sines and cosines of values [B] at frequencies from 1/4 to 4: [B, width]."""
    octaves = torch.linspace(-2, 2, width // 2, dtype=torch.float64, device=values.device)
    angles = values.double()[:, None] * torch.exp2(octaves)
    return torch.cat([angles.sin(), angles.cos()], 1)


class Conditioning(nn.Module):
    """Time, class, caption and strength of guidance -> one vector [B, D]."""

    def __init__(
        self,
        width: int,
        num_classes: int,
        caption_width: int,
        guidance_embeds: bool,
        unconditional: bool,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        # The last class is that of a sample of which nothing is said, where there is such a class.
        known = num_classes + unconditional
        self.classes = nn.Embedding(known, width) if num_classes else None
        self.caption = nn.Linear(caption_width, width) if caption_width else None
        self.no_caption = nn.Parameter(torch.zeros(width)) if caption_width else None
        self.guidance = nn.Linear(2 * FREQUENCIES, width) if guidance_embeds else None
        if self.guidance is not None:
            nn.init.zeros_(self.guidance.weight)
            nn.init.zeros_(self.guidance.bias)

    def forward(
        self,
        timestep: Tensor,
        class_labels: Tensor | None,
        encoder_hidden_states: Tensor | None,
        encoder_attention_mask: Tensor | None,
        guidance: Tensor | None,
    ) -> Tensor:
        """Return the vector; a negative label, or an empty mask, says nothing."""
        dtype = next(self.time.parameters()).dtype
        vector = self.time(sinusoids(timestep, 2 * FREQUENCIES).to(dtype))
        if self.classes is not None:
            # Without that class, a sample that has none is an index error.
            none = self.num_classes
            if class_labels is None:
                class_labels = torch.full(timestep.shape, none, device=timestep.device)
            vector = vector + self.classes(torch.where(class_labels >= 0, class_labels, none))
        if self.caption is not None and self.no_caption is not None:
            if encoder_hidden_states is None or encoder_attention_mask is None:
                vector = vector + self.no_caption
            else:
                seen = encoder_attention_mask[..., None].to(dtype)
                count = seen.sum(1)
                mean = (encoder_hidden_states.to(dtype) * seen).sum(1) / count.clamp_min(1)
                vector = vector + torch.where(count > 0, self.caption(mean), self.no_caption)
        if self.guidance is not None and guidance is not None:
            # Scales are of the order of 5: a tenth of them lies within a period.
            vector = vector + self.guidance(sinusoids(guidance / 10, 2 * FREQUENCIES).to(dtype))
        return silu(vector)


class Block(nn.Module):
    """Attention and an MLP, each behind a modulated norm and a gate that begins at 0."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.heads = heads
        inner = round(mlp_ratio * width)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.inner = nn.Linear(width, inner)
        self.outer = nn.Linear(inner, width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        """Return x [B, N, D]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(vector).chunk(6, -1)
        qkv = self.qkv(modulated(x, shift, scale)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (rms_norm(t, t.shape[-1:], eps=1e-6) for t in (q, k))
        attended = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate[:, None] * self.projection(attended)
        hidden = gelu(self.inner(modulated(x, mlp_shift, mlp_scale)), approximate="tanh")
        return x + mlp_gate[:, None] * self.outer(hidden)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return the layer norm of x [B, N, D], scaled and shifted by vectors [B, D]."""
    return layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


class SmallDiT(ModelMixin, ConfigMixin):
    """A diffusion transformer of few and narrow layers.

    Args:
        sample_size: height and width of an image or latent.
        in_channels: C.
        patch_size: side of a token's square.
        width, num_layers, num_attention_heads, mlp_ratio: of the transformer.
        num_classes: 0 for none.
        caption_width: width of a caption's embeddings; 0 for no captions.
        guidance_embeds: whether it is told how strongly its teacher was guided.
        unconditional: whether a sample may be of no class, as guidance needs it.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int = 8,
        in_channels: int = 1,
        patch_size: int = 2,
        width: int = 128,
        num_layers: int = 4,
        num_attention_heads: int = 4,
        mlp_ratio: float = 4.0,
        num_classes: int = 0,
        caption_width: int = 0,
        guidance_embeds: bool = False,
        unconditional: bool = True,
    ) -> None:
        super().__init__()
        side = sample_size // patch_size
        self.embed = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.conditioning = Conditioning(
            width, num_classes, caption_width, guidance_embeds, unconditional
        )
        self.blocks = nn.ModuleList(
            Block(width, num_attention_heads, mlp_ratio) for _ in range(num_layers)
        )
        self.last_modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, patch_size**2 * in_channels)
        for layer in (self.last_modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.positions = nn.Buffer(grid_positions(side, width), persistent=False)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Transformer2DModelOutput:
        """Return the prediction for images [B, C, H, W] at times [B].

        Args:
            hidden_states: [B, C, H, W].
            timestep: [B], floats of the order of 1.
            class_labels: [B]; negative where no class is said.
            encoder_hidden_states: captions [B, L, caption_width].
            encoder_attention_mask: [B, L]; empty where there is no caption.
            guidance: [B].
        """
        patch = self.config["patch_size"]
        side = hidden_states.shape[-1] // patch
        vector = self.conditioning(
            timestep, class_labels, encoder_hidden_states, encoder_attention_mask, guidance
        )
        x = self.embed(hidden_states).flatten(2).mT + self.positions.to(hidden_states.dtype)
        for block in self.blocks:
            x = block(x, vector)
        x = self.head(modulated(x, *self.last_modulation(vector).chunk(2, -1)))
        x = x.unflatten(1, (side, side)).unflatten(-1, (-1, patch, patch))
        return Transformer2DModelOutput(sample=x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3))


class PointNetwork(ModelMixin, ConfigMixin):
    """An MLP with a residual and a modulated norm in every layer.

    Args:
        in_channels: coordinates of a point.
        width, num_layers: of the MLP.
        num_classes, caption_width, guidance_embeds, unconditional: as in `SmallDiT`.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 2,
        width: int = 128,
        num_layers: int = 3,
        num_classes: int = 0,
        caption_width: int = 0,
        guidance_embeds: bool = False,
        unconditional: bool = True,
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(in_channels, width)
        self.conditioning = Conditioning(
            width, num_classes, caption_width, guidance_embeds, unconditional
        )
        self.layers = nn.ModuleList(nn.Linear(2 * width, width) for _ in range(num_layers))
        self.head = nn.Linear(width, in_channels)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        class_labels: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Transformer2DModelOutput:
        """Return the prediction for points [B, D]; arguments as in `SmallDiT`."""
        vector = self.conditioning(
            timestep, class_labels, encoder_hidden_states, encoder_attention_mask, guidance
        )
        x = self.embed(hidden_states)
        for layer in self.layers:
            x = x + silu(layer(torch.cat([x, vector], 1)))
        return Transformer2DModelOutput(sample=self.head(x))


def grid_positions(side: int, width: int) -> Tensor:
    """Return sines and cosines of rows and columns [side², width]."""
    quarter = width // 4
    frequencies = torch.exp(-math.log(100.0) * torch.arange(quarter) / quarter)
    angles = torch.arange(side)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], 1)
    rows, columns = waves[:, None].expand(-1, side, -1), waves[None].expand(side, -1, -1)
    return torch.cat([rows, columns], 2).flatten(0, 1)
