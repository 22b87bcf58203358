"""The routes of autograd: repeated, partial, frozen, detached."""

from typing import Any

import pytest
import torch
from attention_cases import (
    FAST,
    assert_group_agrees,
    exact,
    gradients,
    group,
    inputs,
    normal,
    weighted_sum,
)
from torch import Tensor

from stillhouse_kernels.shared_attention import (
    autograd,
    follower_attention,
    leader_attention,
    operators,
    streaming,
)

NO_SECOND_DERIVATIVE = "^shared attention has no second derivative; backend='reference' has one$"


@pytest.fixture
def score_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each backward pass over the scores."""
    layers: list[int] = []
    original = streaming.score_backward

    def counted(*arguments: Any) -> Any:
        layers.append(len(arguments[4]))
        return original(*arguments)

    monkeypatch.setattr(streaming, "score_backward", counted)
    return layers


@pytest.fixture
def full_pass() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Leaves, outputs of a leader and three followers, and the reference's gradients."""
    leaves = inputs((2, 1, 1, 1, 1, 1), 12, 12)
    wanted = gradients(group("reference", *leaves, causal=True), leaves)
    return leaves, group("streaming", *leaves, causal=True), wanted


def backward(outs: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    weights = [normal(*out.shape, seed=90 + i) for i, out in enumerate(outs)]
    return list(torch.autograd.grad(outs, leaves, weights, retain_graph=True))


def test_the_group_takes_one_pass_over_the_scores(full_pass: Any, score_passes: list[int]) -> None:
    leaves, outs, wanted = full_pass
    torch.testing.assert_close(gradients(outs, leaves), wanted)
    assert score_passes == [4]


def test_a_repeated_backward_pass(full_pass: Any, score_passes: list[int]) -> None:
    leaves, outs, wanted = full_pass
    for _ in range(2):
        torch.testing.assert_close(backward(outs, leaves), wanted)
    assert score_passes == [4, 4]


def test_accumulated_gradients(full_pass: Any) -> None:
    leaves, outs, wanted = full_pass
    weights = [normal(*out.shape, seed=90 + i) for i, out in enumerate(outs)]
    for out, weight in zip(outs, weights, strict=True):
        out.backward(weight, retain_graph=True)
    torch.testing.assert_close([leaf.grad for leaf in leaves], wanted)


def test_a_pass_that_stops_before_the_leader_leaves_nothing(full_pass: Any) -> None:
    leaves, _, wanted = full_pass
    q, k, v, *values = leaves
    out, state = leader_attention(q, k, v, causal=True, backend="streaming")
    outs = [out, *(follower_attention(state, value) for value in values)]
    weights = [normal(*o.shape, seed=90 + i) for i, o in enumerate(outs)]
    found = torch.autograd.grad(outs[1:], values, weights[1:], retain_graph=True)
    torch.testing.assert_close(list(found), wanted[3:])
    assert state.stash is not None
    assert len(state.stash) == 0
    torch.testing.assert_close(backward(outs, leaves), wanted)
    assert len(state.stash) == 0


@pytest.mark.parametrize("used", [[0], [1, 3], [2], [0, 2]])
def test_outputs_that_are_not_used(full_pass: Any, used: list[int]) -> None:
    leaves, outs, _ = full_pass
    truth = group("reference", *leaves, causal=True)
    chosen = [0, 1, *(2 + i for i in used)]
    some = [leaves[i] for i in chosen]
    torch.testing.assert_close(
        backward([outs[i] for i in used], some), backward([truth[i] for i in used], some)
    )


@pytest.mark.parametrize("frozen", [(0,), (1,), (0, 1), (2, 4), (0, 1, 2), (2, 3, 4, 5)])
def test_frozen_inputs(frozen: tuple[int, ...], score_passes: list[int]) -> None:
    leaves = inputs((2, 1, 1, 1, 1, 1), 12, 12)
    for i in frozen:
        leaves[i].requires_grad_(False)
    learnt = [leaf for leaf in leaves if leaf.requires_grad]
    moving = slice(1, None) if frozen == (0, 1, 2) else slice(None)
    found = gradients(group("streaming", *leaves, causal=True)[moving], learnt)
    wanted = gradients(group("reference", *leaves, causal=True)[moving], learnt)
    torch.testing.assert_close(found, wanted)
    assert score_passes == ([] if {0, 1} <= set(frozen) else [4])


@pytest.mark.parametrize("backend", FAST)
def test_detached_scores(backend: str) -> None:
    leaves = inputs((2, 1, 1, 1), 12, 12, dtype=exact(backend))
    assert_group_agrees(backend, leaves, causal=True, detach_qk=True)
    follower = group(backend, *leaves, detach_qk=True)[1]
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(follower.sum(), [leaves[0]])


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_leader_without_gradients_gets_none(backend: str) -> None:
    q, k, v, other = inputs((2, 1, 1, 1), 12, 12, dtype=exact(backend))
    with torch.no_grad():
        out, state = leader_attention(q, k, v, backend=backend)
    assert not out.requires_grad
    assert state.ticket is None
    follower = follower_attention(state, other)
    assert torch.autograd.grad(follower.sum(), [q, other], allow_unused=True)[0] is None
    assert not follower_attention(state, other.detach()).requires_grad


@pytest.mark.parametrize("backend", FAST)
def test_a_second_derivative_is_refused(backend: str) -> None:
    leaves = inputs((2, 1, 1, 1), 5, 5, dtype=exact(backend))
    outs = group(backend, *leaves)
    (grad,) = torch.autograd.grad(weighted_sum(outs), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND_DERIVATIVE):
        grad.sum().backward()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(
    ("of", "differentiated", "by"),
    [([0, 1], 0, 0), ([0], 1, 0), ([0], 2, 0), ([1], 3, 0), ([1], 0, 3), ([1], 3, 1)],
)
def test_a_second_derivative_is_refused_on_every_path(
    backend: str, of: list[int], differentiated: int, by: int
) -> None:
    """Of the leader's and the follower's outputs; leaves q, k, v and the follower's v."""
    leaves = inputs((2, 1, 1, 1), 5, 5, dtype=exact(backend))
    outs = group(backend, *leaves)
    loss = weighted_sum([outs[i] for i in of])
    (grad,) = torch.autograd.grad(loss, leaves[differentiated], create_graph=True)
    penalised = loss + grad.square().sum()
    with pytest.raises(RuntimeError, match=NO_SECOND_DERIVATIVE):
        torch.autograd.grad(penalised, leaves[by], retain_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND_DERIVATIVE):
        penalised.backward(inputs=[leaves[by]])


def test_a_second_derivative_in_the_incoming_gradient_is_refused() -> None:
    leaves = inputs((2, 1, 1, 1), 5, 5)
    for out, leaf in zip(group("streaming", *leaves), (leaves[2], leaves[3]), strict=True):
        weight = torch.ones_like(out, requires_grad=True)
        (grad,) = torch.autograd.grad(out, leaf, weight, create_graph=True)
        with pytest.raises(RuntimeError, match=NO_SECOND_DERIVATIVE):
            torch.autograd.grad(grad.sum(), weight)


@pytest.mark.parametrize(("differentiated", "by"), [(0, 0), (2, 0), (3, 1)])
def test_the_operators_refuse_a_second_derivative(differentiated: int, by: int) -> None:
    leaves = q, k, v, other = inputs((2, 1, 1, 1), 5, 5)
    settings = (None, True, 0.25, "streaming")
    out, lse, kept = operators.leader_forward(q, k, v, *settings)
    loss = out.sum() + operators.follower_forward(q, k, other, lse, kept, *settings).sum()
    (grad,) = torch.autograd.grad(loss, leaves[differentiated], create_graph=True)
    with pytest.raises(RuntimeError, match=NO_SECOND_DERIVATIVE):
        torch.autograd.grad(loss + grad.square().sum(), leaves[by])


@pytest.mark.parametrize("repeats", [1, 2])
def test_a_pass_that_raises_leaves_nothing(full_pass: Any, repeats: int) -> None:
    leaves, _, wanted = full_pass
    q, k, v, *values = leaves
    out, state = leader_attention(q, k, v, causal=True, backend="streaming")
    outs = [out, *(follower_attention(state, value) for value in values)]
    failing = True

    def fail(grad: Tensor) -> None:
        if failing:
            raise ArithmeticError("no gradient")

    outs[1].register_hook(fail)  # The followers behind it have run by then.
    for _ in range(repeats):
        with pytest.raises(ArithmeticError):
            backward(outs, leaves)
        assert state.stash is not None
        assert len(state.stash) == 0
    failing = False
    torch.testing.assert_close(backward(outs, leaves), wanted)


def test_an_entry_that_is_lost_is_noticed(full_pass: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves, outs, _ = full_pass
    monkeypatch.setattr(autograd.GradientStash, "add", lambda *_: None)
    with pytest.raises(RuntimeError) as e:
        gradients(outs, leaves)
    assert str(e.value) == (
        "shared attention: 3 followers sent a gradient, 0 left their values; the leader's and the "
        "followers' backward passes must run in one call"
    )
