"""Fake scores: they begin as their teacher, and it stays what it was whatever they learn."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from generators import (
    DIGITS,
    POINTS,
    digit_generator,
    point_generator,
    ring_mixture,
    saved,
    shaken,
    transformer,
)
from torch import Tensor, nn

from stillhouse.data.pictures.mixtures import ring
from stillhouse.diffusion.guidance import fixed, guided
from stillhouse.diffusion.times import uniform
from stillhouse.errors import UserError
from stillhouse.families.timestep import dmd2
from stillhouse.families.timestep.matching import score_difference
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.rollouts import backward_simulation
from stillhouse.objectives.adversarial import non_saturating
from stillhouse.objectives.consistency import even
from stillhouse.objectives.distribution_matching import plain
from stillhouse.records.diffusion import Condition, ImageBatch
from stillhouse.students.denoisers import Denoiser, unet
from stillhouse.students.discriminators import mlp_head, on_features
from stillhouse.teachers.fake_scores import AdaptedTeacher, full_copy, lora, pretrained

ADAPTED = partial(lora, rank=3, alpha=6.0, target_modules=["embed", "head"])
ATTENTION = partial(lora, rank=2, alpha=2.0, target_modules=["qkv", "inner"])


def teacher() -> nn.Module:
    return point_generator().requires_grad_(False)


def asked(network, count: int = 6, dtype: torch.dtype = torch.float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 2, generator=generator).to(dtype)
    t = torch.linspace(0.1, 1.5, count, dtype=torch.double)
    return network(x, t, Condition(labels=torch.arange(count) % 4))


def learn(fake: nn.Module, steps: int = 1) -> None:
    """Take some steps to nowhere in particular."""
    optimizer = torch.optim.SGD([p for p in fake.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (asked(fake) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("builder", [full_copy, ADAPTED])
def test_it_begins_as_its_teacher_and_leaves_it(builder) -> None:
    """Bit for bit, before and after any number of steps that it learns in."""
    network = teacher()
    before, weights = asked(network), copy.deepcopy(network.state_dict())
    fake = builder(network)
    assert torch.equal(asked(fake), before)
    for steps in (1, 5):
        learn(fake, steps)
        assert (asked(fake) - before).abs().max() > 1e-3
        assert torch.equal(asked(network), before)
    assert all(torch.equal(v, weights[k]) for k, v in network.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_all_weights_of_a_copy_learn() -> None:
    """Also of a teacher that is frozen, which it shares nothing with."""
    network = teacher()
    fake = full_copy(network)
    assert all(p.requires_grad for p in fake.parameters())
    shared = {p.data_ptr() for p in network.parameters()} & {
        p.data_ptr() for p in fake.parameters()
    }
    assert not shared


def test_adapters_alone_learn_and_alone_are_kept() -> None:
    """The teacher's weights are neither among the parameters nor in the state that is saved."""
    network = teacher()
    fake = ADAPTED(network)
    names = {f"adapters.{i}.{part}" for i in range(2) for part in "AB"}
    assert set(dict(fake.named_parameters())) == set(fake.state_dict()) == names
    learn(fake)
    again = ADAPTED(network)
    again.load_state_dict(fake.state_dict())
    assert torch.equal(asked(again), asked(fake))
    fake.train()
    assert not network.training


@pytest.mark.parametrize("alpha", [3.0, 12.0])
def test_adapters_are_a_change_of_weights(alpha: float) -> None:
    """W + (α/r) B A, of the named layers and of no other."""
    network = teacher()
    fake = lora(network, rank=3, alpha=alpha, target_modules=["embed", "head"])
    learn(fake, 3)
    merged = copy.deepcopy(network)
    linear = {n: m for n, m in merged.named_modules() if isinstance(m, nn.Linear)}
    chosen = [m for n, m in linear.items() if n.rpartition(".")[2] in ("embed", "head")]
    assert len(chosen) == 2 < len(linear)
    with torch.no_grad():
        for layer, adapter in zip(chosen, fake.adapters, strict=True):
            layer.weight += alpha / 3 * adapter.get_parameter("B") @ adapter.get_parameter("A")
    torch.testing.assert_close(asked(fake), asked(merged))


def test_adapters_are_off_after_a_call_that_fails() -> None:
    """In the middle of it, with hooks standing: the teacher is what it was, and has none."""
    network = teacher()
    fake = ADAPTED(network)
    learn(fake)
    before, adapted = asked(network), asked(fake)

    def fail(*_) -> None:
        raise ArithmeticError

    handle = network.model.head.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        asked(fake)
    handle.remove()
    assert not any(module._forward_hooks for module in network.modules())
    assert torch.equal(asked(network), before)
    assert torch.equal(asked(fake), adapted)


def test_one_network_answers_for_both_when_they_are_guided() -> None:
    network = teacher()
    fake = ADAPTED(network)
    learn(fake)
    assert fake.unconditional
    x, t = torch.randn(5, 2), torch.linspace(0.2, 1.4, 5, dtype=torch.double)
    condition, scale = Condition(labels=torch.arange(5) % 4), torch.full((5,), 3.0).double()
    before = guided(network, x, t, condition, scale)
    of_fake = guided(fake, x, t, condition, scale)
    assert torch.equal(guided(network, x, t, condition, scale), before)
    none, said = (fake(x, t, c) for c in (condition.none(), condition))
    torch.testing.assert_close(of_fake, none + 3 * (said - none))


def test_gradients_reach_samples_through_adapted_layers() -> None:
    """A discriminator on a fake score's features pulls samples, though no weight learns then."""
    network = teacher()
    fake = ADAPTED(network)
    learn(fake)
    fake.requires_grad_(False)
    x = torch.randn(3, 2, requires_grad=True)
    t, condition = torch.ones(3, dtype=torch.double), Condition(labels=torch.zeros(3).long())
    ours, theirs = (torch.autograd.grad(n(x, t, condition).sum(), x)[0] for n in (fake, network))
    assert (ours - theirs).abs().max() > 1e-4


def test_adapters_are_float32_whatever_their_teacher_is() -> None:
    network = teacher().bfloat16()
    fake = ADAPTED(network)
    assert {p.dtype for p in fake.parameters()} == {torch.float}
    dtype = torch.bfloat16
    assert asked(fake, dtype=dtype).dtype == asked(network, dtype=dtype).dtype
    assert torch.equal(asked(fake, dtype=dtype), asked(network, dtype=dtype))


def test_every_layer_of_a_name_is_adapted() -> None:
    """Those of each block of a transformer."""
    fake = ATTENTION(digit_generator())
    assert isinstance(fake, AdaptedTeacher)
    assert len(fake.adapters) == 2
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2, dtype=torch.double)
    fake(x, t, Condition(labels=torch.zeros(2).long())).sum().backward()
    gradients = [a.get_parameter("B").grad for a in fake.adapters]
    assert all(g is not None and g.abs().max() > 0 for g in gradients)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(
        UserError, match=r"target_modules=\['haed'\]: the teacher has no linear lay"
    ):
        lora(teacher(), rank=2, alpha=1.0, target_modules=["haed"])


def test_a_teacher_without_weights_is_not_copied() -> None:
    with pytest.raises(
        UserError, match="a GaussianMixture, has no weights to begin from; expected"
    ):
        full_copy(ring_mixture())


def test_a_network_of_an_earlier_stage_begins_for_a_teacher_that_is_exact(tmp_path: Path) -> None:
    network = point_generator(3)
    path = saved(network, tmp_path / "points", POINTS)
    fake = pretrained(ring_mixture(), path=path)
    assert torch.equal(asked(fake), asked(network))
    assert all(p.requires_grad for p in fake.parameters())


class Shown(NamedTuple):
    """What a builder reads of data."""

    image_shape: tuple[int, ...] = (1, 8, 8)
    classes: tuple[str, ...] = tuple("0123456789")
    caption_width: int = 0

    @property
    def told_classes(self) -> tuple[str, ...]:
        return self.classes


def unet_of(data: Any) -> Denoiser:
    settings = {"widths": [16, 24], "layers_per_block": 1, "norm_num_groups": 8}
    return shaken(unet(data, **settings))


def test_a_fake_score_may_be_of_another_architecture(tmp_path: Path) -> None:
    """A UNet beside a transformer: a step of DMD2, whose heads stand on the UNet's features."""
    fake = pretrained(digit_generator(), path=saved(unet_of(Shown()), tmp_path / "unet", DIGITS))
    heads = on_features(
        fake, features=["network.model.mid_block"], head=partial(mlp_head, hidden=4)
    )
    student = digit_generator(2).requires_grad_(True)
    of = Networks(student, digit_generator().requires_grad_(False), None, fake, heads)
    shared: Any = {
        "rollout": partial(backward_simulation, times=[1.5708]),
        "guidance_scale": fixed,
        "adversarial": non_saturating(),
        "adversarial_times": uniform,
        "adversarial_weight": 0.1,
    }
    batch = ImageBatch(torch.randn(4, 1, 8, 8), Condition(labels=torch.tensor([0, 3, 9, -1])))
    generator = torch.Generator().manual_seed(0)
    matching = partial(score_difference, times=uniform, weighting=plain)
    steps = (
        (partial(dmd2.student, matching=matching), [student]),
        (partial(dmd2.critic, times=uniform, weighting=even), [fake, heads]),
    )
    for loss, learning in steps:
        for network in (student, fake, heads):
            network.requires_grad_(network in learning)
        loss(of, batch, Phase(0, 1), generator, **shared).total.backward()
        for network in learning:
            assert any(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (point_generator, "samples have the shape 2, the teacher's 1 x 8 x 8"),
        (lambda: unet_of(Shown(classes=("a", "b"))), "number of classes is 2, the teacher's 10"),
        (lambda: unet_of(Shown(classes=())), "number of classes is 0, the teacher's 10"),
        (
            lambda: transformer(Shown(caption_width=12)),
            "captions have the width 12, the teacher's 0",
        ),
    ],
)
def test_a_network_of_other_data_is_no_fake_score(
    tmp_path: Path, build: Callable[[], Denoiser], message: str
) -> None:
    path = saved(build(), tmp_path / "other", DIGITS)
    with pytest.raises(UserError) as refusal:
        pretrained(digit_generator(), path=path)
    assert str(refusal.value) == (
        f"stages.<stage>.family.fake_score.path={path}: its {message}; expected a network that was "
        "trained on the teacher's data"
    )


def test_a_mixture_has_classes_as_well(tmp_path: Path) -> None:
    path = saved(point_generator(), tmp_path / "points", POINTS)
    with pytest.raises(UserError, match="its number of classes is 4, the teacher's 2; expected"):
        pretrained(ring(classes=2), path=path)
