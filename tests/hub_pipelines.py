"""Tiny text-to-image pipelines with random weights, in the folders that the hub's lie in."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLWan,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    SanaTransformer2DModel,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    UMT5Config,
    UMT5EncoderModel,
)

from stillhouse.stages.take_encoder import character_tokenizer

VOCABULARY = 160
WIDTH = 12
TOKENS = 16


def save(folder: Path, kind: str, **parts: Any) -> str:
    """Write a pipeline of these parts, with the tokenizer of its text encoder."""
    tokenizer = character_tokenizer(VOCABULARY, "tests")
    tokenizer.model_max_length = TOKENS
    index: dict[str, Any] = {"_class_name": kind}
    for name, part in {**parts, "tokenizer": tokenizer}.items():
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.split(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return str(folder)


def stable_diffusion(folder: Path, *, prediction_type: str = "epsilon") -> str:
    """Write a UNet that predicts at a thousand levels of noise, told captions by CLIP."""
    torch.manual_seed(0)
    return save(
        folder,
        "StableDiffusionPipeline",
        unet=UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            attention_head_dim=4,
            norm_num_groups=4,
            cross_attention_dim=WIDTH,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            scaling_factor=0.18215,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        scheduler=DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction_type,
        ),
    )


def sana(folder: Path, *, timestep_scale: float = 0.001) -> str:
    """Write a teacher of SANA-Sprint: a flow that is told times from 0 to 1."""
    torch.manual_seed(0)
    return save(
        folder,
        "SanaPipeline",
        transformer=SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=WIDTH,
            sample_size=8,
            patch_size=1,
            qk_norm="rms_norm_across_heads",
            timestep_scale=timestep_scale,
        ),
        vae=AutoencoderDC(
            latent_channels=4,
            attention_head_dim=4,
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
            encoder_block_out_channels=(8, 16),
            decoder_block_out_channels=(8, 16),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            scaling_factor=0.41407,
        ),
        text_encoder=Gemma2Model(
            Gemma2Config(
                vocab_size=VOCABULARY,
                hidden_size=WIDTH,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=32,
            )
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )


def wan(folder: Path) -> str:
    """Write a Wan: a flow of films that is told 1000 s, and captions by half a T5."""
    torch.manual_seed(0)
    return save(
        folder,
        "WanPipeline",
        transformer=WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=WIDTH,
            freq_dim=16,
            ffn_dim=16,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[1.5, 2.0, 0.5, 1.0],
        ),
        text_encoder=UMT5EncoderModel(
            UMT5Config(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                d_kv=6,
                d_ff=16,
                num_layers=1,
                num_heads=2,
            )
        ),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )


PIPELINES: Mapping[str, Callable[[Path], str]] = {
    "stable_diffusion": stable_diffusion,
    "sana": sana,
    "wan": wan,
}
