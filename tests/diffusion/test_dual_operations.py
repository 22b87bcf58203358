"""Forward-mode derivatives of other people's networks, with the operations that torch lacks."""

from collections.abc import Callable

import pytest
import torch
from diffusers import DiTTransformer2DModel, SanaTransformer2DModel, UNet2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import group_norm, scaled_dot_product_attention

from stillhouse.diffusion.dual_operations import dual_operations
from stillhouse.errors import UserError

LABELS = torch.tensor([1, 2])


def dit() -> Callable[[Tensor, Tensor], Tensor]:
    network = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
    )
    network = network.double().eval()
    return lambda x, t: network(x, timestep=t, class_labels=LABELS).sample


def unet() -> Callable[[Tensor, Tensor], Tensor]:
    network = UNet2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=10,
        norm_num_groups=8,
    )
    network = network.double().eval()
    return lambda x, t: network(x, t, class_labels=LABELS).sample


def sana() -> Callable[[Tensor, Tensor], Tensor]:
    network = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=24,
        sample_size=8,
        patch_size=1,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    network = network.double().eval()
    captions, guidance = torch.randn(2, 5, 24, dtype=torch.double), torch.ones(2).double()
    seen = torch.tensor([[1.0, 1, 1, 0, 0], [1, 1, 1, 1, 1]])

    def call(x: Tensor, t: Tensor) -> Tensor:
        return network(
            x,
            encoder_hidden_states=captions,
            timestep=t,
            guidance=guidance,
            encoder_attention_mask=seen,
        ).sample

    return call


@pytest.mark.parametrize("build", [dit, unet, sana])
def test_the_tangent_of_a_diffusers_network_is_its_central_difference(build) -> None:
    torch.manual_seed(0)
    network = build()
    x, x_t = torch.randn(2, 2, 4, 8, 8, dtype=torch.double)
    t, t_t = torch.tensor([[0.7, 0.3], [0.9, 1.1]], dtype=torch.double)
    with torch.no_grad():
        with dual_operations():
            out, out_t = torch.func.jvp(network, (x, t), (x_t, t_t))[:2]
        torch.testing.assert_close(out, network(x, t))
        # All embed the time in float32; Sana computes its linear attention in it, past relus.
        h = 1e-3
        f = [network(x + n * h * x_t, t + n * h * t_t) for n in (-2, -1, 1, 2)]
        difference = (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)
    assert (out_t - difference).norm() < (5e-3 if build is sana else 1e-5) * difference.norm()


@pytest.mark.parametrize("build", [dit, sana])
def test_it_is_the_tangent_of_the_math_backend(build) -> None:
    torch.manual_seed(0)
    network = build()
    x, x_t = torch.randn(2, 2, 4, 8, 8, dtype=torch.double)
    t, t_t = torch.tensor([[0.7, 0.3], [0.9, 1.1]], dtype=torch.double)
    with torch.no_grad():
        with dual_operations():
            ours = torch.func.jvp(network, (x, t), (x_t, t_t))[1]
        with sdpa_kernel(SDPBackend.MATH):
            theirs = torch.func.jvp(network, (x, t), (x_t, t_t))[1]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_without_it_torch_has_no_tangent() -> None:
    """The reason for the module: where this passes no more, the module may go."""
    network = dit()
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.double), torch.ones(2, dtype=torch.double)
    with pytest.raises(NotImplementedError, match="scaled_dot_product"):
        torch.func.jvp(network, (x, t), (x, t))


def six(*shape: int) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(*shape, dtype=torch.double) for _ in range(6)]


def both(mask: Tensor | None, tensors: list[Tensor], **options) -> tuple[Tensor, Tensor]:
    """Return our tangent and the math backend's."""

    def run(*qkv: Tensor) -> Tensor:
        return scaled_dot_product_attention(*qkv, attn_mask=mask, **options)

    with dual_operations():
        ours = torch.func.jvp(run, tuple(tensors[:3]), tuple(tensors[3:]))[1]
    with sdpa_kernel(SDPBackend.MATH):
        theirs = torch.func.jvp(run, tuple(tensors[:3]), tuple(tensors[3:]))[1]
    return ours, theirs


MASKS = {
    "none": None,
    "boolean": torch.ones(5, 5, dtype=torch.bool).tril(),
    "hides by -10000": torch.ones(5, 5).triu(1).double() * -10_000,
    "hides by -inf": torch.full((5, 5), -torch.inf, dtype=torch.double).triu(1),
    "a bias": torch.linspace(-3, 3, 25, dtype=torch.double).view(5, 5),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_mean_what_they_mean_to_torch(name: str) -> None:
    ours, theirs = both(MASKS[name], six(2, 3, 5, 4))
    torch.testing.assert_close(ours, theirs)
    assert ours.norm() > 0


def test_other_forms_of_a_call() -> None:
    torch.testing.assert_close(*both(None, six(2, 3, 5, 4), is_causal=True, scale=0.3))
    torch.testing.assert_close(*both(None, six(6, 5, 4)))
    tensors = six(2, 4, 5, 4)
    for i in (1, 2, 4, 5):
        tensors[i] = tensors[i][:, :2]
    torch.testing.assert_close(*both(None, tensors, enable_gqa=True))
    fewer = six(2, 3, 5, 4)
    for i in (1, 2, 4, 5):
        fewer[i] = fewer[i][:, :, :3]
    torch.testing.assert_close(*both(None, fewer, is_causal=True))


def test_a_group_norm_whose_tangent_lies_otherwise_in_memory() -> None:
    norm = nn.GroupNorm(2, 6).double()
    x, x_t = torch.randn(2, 2, 5, 6, dtype=torch.double)

    def run(x: Tensor) -> Tensor:
        return norm(x.transpose(1, 2))

    with dual_operations():
        out, out_t = torch.func.jvp(run, (x,), (x_t,))[:2]
    h = 1e-5
    torch.testing.assert_close(out, run(x))
    torch.testing.assert_close(out_t, (run(x + h * x_t) - run(x - h * x_t)) / (2 * h))


def test_dropped_attention_weights_are_refused() -> None:
    q = torch.randn(1, 2, 3, 4)
    with dual_operations(), pytest.raises(UserError) as refusal:
        scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    assert str(refusal.value) == (
        "the network drops attention weights (dropout_p=0.1), other ones in every pass of a "
        "tangent; set its attention dropout to 0"
    )


def test_nothing_changes_outside() -> None:
    before = (torch.nn.functional.scaled_dot_product_attention, torch.nn.functional.group_norm)
    with dual_operations():
        pass
    assert before == (scaled_dot_product_attention, group_norm)
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda q: scaled_dot_product_attention(q, q, q), (q,), (q,))
