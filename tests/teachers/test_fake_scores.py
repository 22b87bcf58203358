"""Fake scores: they begin as their teacher, and it stays what it was whatever they learn."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from generators import POINTS, digit_generator, point_generator, ring_mixture, saved
from torch import Tensor, nn

from stillhouse.diffusion.guidance import guided
from stillhouse.errors import UserError
from stillhouse.records.diffusion import Condition
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
    with pytest.raises(UserError, match="its samples are 2, the teacher's 1 x 8 x 8"):
        pretrained(digit_generator(), path=path)
