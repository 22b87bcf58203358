"""The networks that papers distil, by the hub's configurations: built, one block differentiated.

SANA-Sprint 0.6B (2503.09641) and Wan 2.1 1.3B, which rCM distils (2510.08431). All layers stand on
the meta device, without memory; one layer of full width goes through the tangent engine.
"""

from typing import Any

import pytest
import torch
from diffusers import SanaTransformer2DModel, WanTransformer3DModel
from torch import Tensor

from stillhouse.diffusion.tangents import check_network

SANA: dict[str, Any] = {
    "in_channels": 32,
    "out_channels": 32,
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_layers": 28,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
    "caption_channels": 2304,
    "mlp_ratio": 2.5,
    "sample_size": 32,
    "patch_size": 1,
    "guidance_embeds": True,
    "guidance_embeds_scale": 0.1,
    "qk_norm": "rms_norm_across_heads",
    "timestep_scale": 1.0,
}
WAN: dict[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 12,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 8960,
    "num_layers": 30,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
}


@pytest.mark.parametrize(
    ("kind", "settings", "billions"),
    [(SanaTransformer2DModel, SANA, 0.6), (WanTransformer3DModel, WAN, 1.4)],
)
def test_the_whole_network_has_its_size(kind, settings: dict[str, Any], billions: float) -> None:
    with torch.device("meta"):
        network = kind(**settings)
    count = sum(p.numel() for p in network.parameters())
    assert count / 1e9 == pytest.approx(billions, abs=0.05)


def test_a_block_of_sana_sprint_has_a_tangent() -> None:
    torch.manual_seed(0)
    network = SanaTransformer2DModel(**{**SANA, "num_layers": 1}).eval()
    captions, seen = torch.randn(1, 6, 2304), torch.tensor([[1.0, 1, 1, 1, 0, 0]])

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return network(
            x,
            encoder_hidden_states=captions,
            encoder_attention_mask=seen,
            timestep=t,
            guidance=torch.full((1,), 4.5),
        ).sample

    x, t = torch.randn(1, 32, 4, 4), torch.tensor([0.8], dtype=torch.double)
    check_network(network, velocity, x, t)


def test_a_block_of_wan_has_a_tangent() -> None:
    """Wan is told 1000 s; its tangent along the time is of that size."""
    torch.manual_seed(0)
    network = WanTransformer3DModel(**{**WAN, "num_layers": 1}).eval()
    captions = torch.randn(1, 6, 4096)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return network(x, timestep=1000 * t, encoder_hidden_states=captions).sample

    x, t = torch.randn(1, 16, 1, 4, 4), torch.tensor([0.8], dtype=torch.double)
    check_network(network, velocity, x, t)
