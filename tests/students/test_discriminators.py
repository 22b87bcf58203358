"""Discriminators: what heads read of a trunk, what reaches it, and SANA-Sprint's head."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from generators import DIGITS, data_of, digit_generator, point_generator, shaken
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.records.diffusion import Condition
from stillhouse.students.denoisers import Denoiser, unet
from stillhouse.students.discriminators import (
    Discriminator,
    convolutional_head,
    mlp_head,
    on_features,
)

SMALL = partial(mlp_head, hidden=4)
MODEL = "network.model"


def small_unet() -> Denoiser:
    settings = {"widths": [16, 24], "layers_per_block": 1, "norm_num_groups": 8}
    return shaken(unet(data_of(DIGITS), **settings))


# A trunk, a module of it, and tokens and width of what that returns: a transformer's tokens, a
# map's pixels, a point's single one.
TRUNKS = {
    "tokens": (digit_generator, "blocks.0", 4, 8),
    "a map": (small_unet, "mid_block", 16, 24),
    "points": (point_generator, "layers.0", 1, 8),
}


def asked(trunk: Denoiser, count: int = 5) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, *trunk.sample_shape, generator=generator)
    t = torch.linspace(0.2, 1.4, count, dtype=torch.double)
    return x, t, Condition(labels=torch.arange(count) % 4)


@pytest.mark.parametrize("kind", TRUNKS)
@pytest.mark.parametrize("head", [SMALL, partial(convolutional_head, kernel=3)])
def test_a_logit_for_every_token_of_what_a_module_returns(kind: str, head: Any) -> None:
    build, name, tokens, width = TRUNKS[kind]
    trunk, widths = build(), []

    def noted(given: int) -> nn.Module:
        widths.append(given)
        return head(given)

    discriminator = on_features(trunk, features=[f"{MODEL}.{name}"], head=noted)
    assert widths == [width]
    assert discriminator(trunk, *asked(trunk)).shape == (5, tokens)


def test_heads_read_the_modules_of_their_names() -> None:
    """In the order of the names: a head that passes a feature on returns what the module made."""
    trunk = digit_generator()
    names = [f"{MODEL}.blocks.0", f"{MODEL}.conditioning", f"{MODEL}.head"]
    kept: dict[str, Tensor] = {}
    modules = dict(trunk.named_modules())
    for name in names:
        modules[name].register_forward_hook(lambda m, i, out, name=name: kept.update({name: out}))
    trunk(*asked(trunk))
    discriminator = Discriminator({name: nn.Identity() for name in names})
    expected = torch.cat([kept[name].flatten(1) for name in names], 1)
    assert torch.equal(discriminator(trunk, *asked(trunk)), expected)


def test_what_is_told_is_read() -> None:
    """Samples of another class, and at another time, have other logits."""
    trunk = digit_generator()
    discriminator = on_features(trunk, features=[f"{MODEL}.blocks.0"], head=SMALL)
    x, t, said = asked(trunk)
    logits = discriminator(trunk, x, t, said)
    assert (discriminator(trunk, x, t, said.rolled()) - logits).abs().amin(1).max() > 1e-4
    assert (discriminator(trunk, x, t / 2, said) - logits).abs().amin(1).max() > 1e-4


@pytest.mark.parametrize("kind", TRUNKS)
def test_a_frozen_trunk_passes_a_gradient_on_and_keeps_none(kind: str) -> None:
    build, name, _, _ = TRUNKS[kind]
    trunk = build().requires_grad_(False)
    discriminator = on_features(trunk, features=[f"{MODEL}.{name}"], head=SMALL)
    x, t, said = asked(trunk)
    discriminator(trunk, x.requires_grad_(), t, said).sum().backward()
    assert x.grad is not None
    assert (x.grad.abs().flatten(1).amax(1) > 0).all()
    assert all(p.grad is None for p in trunk.parameters())
    assert all(p.grad is not None for p in discriminator.parameters())
    assert set(discriminator.state_dict()) == set(dict(discriminator.named_parameters()))


def test_nothing_hangs_on_a_trunk_behind_a_call() -> None:
    """Nor behind one that fails."""
    trunk = point_generator()
    discriminator = on_features(trunk, features=[f"{MODEL}.layers.0"], head=SMALL)
    x, t, said = asked(trunk)
    discriminator(trunk, x, t, said)
    with pytest.raises(RuntimeError):
        discriminator(trunk, x[:, :1], t, said)
    assert not any(module._forward_hooks for module in trunk.modules())


def conv(width: int = 6, **options: Any) -> Any:
    torch.manual_seed(0)
    return convolutional_head(width, **options)


def tokens(count: int, length: int = 12, width: int = 6) -> Tensor:
    return torch.randn(count, length, width, generator=torch.Generator().manual_seed(1))


def test_every_convolution_has_the_norm_of_one() -> None:
    """Of its largest singular value, whatever its weights become."""
    head = conv()
    layers = [m for m in head.modules() if isinstance(m, nn.Conv1d)]
    assert [layer.kernel_size for layer in layers] == [(1,), (9,), (1,)]
    with torch.no_grad():
        for layer in layers:
            parametrization: Any = layer.parametrizations
            parametrization.weight.original.mul_(7.0).add_(0.3)
    for _ in range(30):
        head(tokens(8))
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert float(norm.detach()) == pytest.approx(1, abs=1e-3)


def test_tokens_lie_on_a_circle() -> None:
    """Turned tokens have turned logits; without its kernel, every token is on its own."""
    head, x = conv().eval(), tokens(8)
    torch.testing.assert_close(head(x.roll(5, 1)), head(x).roll(5, -1))
    changed = x.clone()
    changed[:, 0] += 0.01
    far = (head(changed) - head(x)).abs().mean((0, 1))
    # Through the means of the virtual batch every token is moved a little, those near it more.
    near = far[[0, 1, 2, 3, 4, 8, 9, 10, 11]].mean()
    assert near > 2 * far[5:8].mean()


def test_the_second_block_stands_beside_the_first() -> None:
    head, x = conv().eval(), tokens(8)
    first = head.first(x.mT)
    expected = head.last((first + head.second(first)) / math.sqrt(2))
    torch.testing.assert_close(head(x), expected)
    nn.init.zeros_(head.second[1].weight)
    torch.testing.assert_close(head(x), head.last(first / math.sqrt(2)))


def test_virtual_batches_know_nothing_of_each_other() -> None:
    """Twenty samples are two of eight and one of four; within one, a sample counts for all."""
    head, x = conv().eval(), tokens(20)
    logits, changed = head(x), x.clone()
    changed[9] += 1.0
    moved = (head(changed) - logits).abs().amax(1)
    assert (moved[:8] == 0).all()
    assert (moved[8:16] > 0).all()
    assert (moved[16:] == 0).all()
    parts = torch.cat([head(part) for part in x.split(8)])
    torch.testing.assert_close(parts, logits)
    normed = head.first[1](100 * x[:8].mT + 5)
    torch.testing.assert_close(normed.mean((0, 2)), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.square().mean((0, 2)), torch.ones(6))


def test_kernels_that_do_not_fit_are_refused() -> None:
    key = "stages.<stage>.family.discriminator.head.kernel"
    with pytest.raises(UserError) as even:
        conv(kernel=8)
    assert str(even.value) == f"{key}=8: expected an odd number, such as 9"
    assert conv()(tokens(8, length=4)).shape == (8, 1, 4)
    with pytest.raises(UserError) as long:
        conv()(tokens(8, length=3))
    assert str(long.value) == f"{key}=9: there are 3 tokens; expected at most 7"
