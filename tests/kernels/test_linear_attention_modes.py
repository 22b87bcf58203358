"""ReLU linear attention under forward-mode AD, torch.compile, checkpointing and autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from attention_cases import relative
from linear_cases import BACKENDS, Six, draw, leaves_and_tangents, plain, true_gradients, truth
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from stillhouse_kernels.linear_attention import (
    operators,
    relu_linear_attention,
    relu_linear_attention_jvp,
)

# torch's own, when it first loads what forward-mode AD needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


def test_reference_has_derivatives_of_any_order() -> None:
    leaves, tangents = leaves_and_tangents(shape=(2, 1, 3, 4, 3, 2), batch=1)

    def derivative(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: torch.func.jvp(f, t, tangents)[1]

    def ours(*t: Tensor) -> Tensor:
        return relu_linear_attention(*t, backend="reference")

    torch.testing.assert_close(
        derivative(derivative(ours))(*leaves), derivative(derivative(plain))(*leaves)
    )
    by_hand = relu_linear_attention_jvp(*leaves, *tangents, backend="reference")[1]
    torch.testing.assert_close(
        torch.autograd.grad(by_hand.sum(), leaves),
        torch.autograd.grad(derivative(plain)(*leaves).sum(), leaves),
    )


def derive(leaves: Six, tangents: Six, **options: Any) -> tuple[Tensor, Tensor]:
    """A loss's shape in one pass: the primal carries gradients, its tangent is a constant."""
    out, out_t = torch.func.jvp(
        lambda *t: relu_linear_attention(*t, **options), tuple(leaves), tuple(tangents)
    )
    return out, out_t.detach()


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("auto", None), ("auto", True), ("reference", None)]
)
def test_compiled_in_one_graph(backend: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    leaves, tangents = leaves_and_tangents()

    def run(*six: Tensor) -> tuple[Tensor, Tensor]:
        return derive(six[:3], six[3:], backend=backend)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    out, out_t = compiled(*leaves, *tangents)
    wanted, wanted_t = truth([*leaves, *tangents])
    assert out_t.norm() > 0
    torch.testing.assert_close((out, out_t), (wanted, wanted_t))
    torch.testing.assert_close(
        list(torch.autograd.grad(out, leaves, wanted_t)), true_gradients(leaves, wanted_t)
    )


def test_a_checkpoint_around_the_jvp() -> None:
    leaves, tangents = leaves_and_tangents()
    run: Any = checkpoint
    out, out_t = run(derive, leaves, tangents, use_reentrant=False)
    torch.testing.assert_close((out, out_t), truth([*leaves, *tangents]))
    torch.testing.assert_close(
        list(torch.autograd.grad(out, leaves, out_t)), true_gradients(leaves, out_t)
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
def test_jacfwd() -> None:
    q, k, v = (t[:1, :2, :4] for t in draw((2, 2, 4, 4, 3, 2))[:3])
    found = torch.func.jacfwd(lambda q: relu_linear_attention(q, k, v))(q)
    torch.testing.assert_close(found, torch.func.jacrev(lambda q: plain(q, k, v))(q))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_as_for_an_attention(backend: str) -> None:
    leaves, tangents = leaves_and_tangents(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, out_t = derive(leaves, tangents, backend=backend)
        by_hand = relu_linear_attention_jvp(*leaves, *tangents, backend=backend)
    assert out.dtype == out_t.dtype == torch.bfloat16
    # Accumulated in float32: no worse than the inputs' and the output's rounding.
    rounded = [t.bfloat16() for t in (*leaves, *tangents)]
    wanted, wanted_t = truth(rounded)
    assert relative(out, wanted) < 2.5e-3
    assert relative(out_t, wanted_t) < 2.5e-3
    torch.testing.assert_close(tuple(t.detach() for t in by_hand), (out.detach(), out_t))
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), leaves))


def test_a_gradient_of_the_tangent_raises() -> None:
    leaves, tangents = leaves_and_tangents()
    learnt = [t.clone().requires_grad_() for t in tangents]
    _, of_jvp = torch.func.jvp(relu_linear_attention, leaves, tangents)
    _, by_hand = relu_linear_attention_jvp(*leaves, *learnt)
    for out_t, leaf in ((of_jvp, leaves[0]), (by_hand, leaves[2]), (by_hand, learnt[0])):
        with pytest.raises(RuntimeError) as raised:
            torch.autograd.grad(out_t.sum(), leaf, retain_graph=True)
        assert str(raised.value) == (
            "relu_linear_attention: its tangent has no gradient in the fast paths; detach the "
            "tangent (the losses of sCM and MeanFlow stop the gradient there), or take "
            "backend='reference'"
        )


def test_a_second_derivative_raises() -> None:
    leaves, _ = leaves_and_tangents()
    out = relu_linear_attention(*leaves)
    (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError) as raised:
        grad.sum().backward()
    assert str(raised.value) == (
        "relu_linear_attention: the fast paths have no second derivative; backend='reference' has "
        "one"
    )


def test_a_backward_pass_in_a_dual_level_raises() -> None:
    leaves, tangents = leaves_and_tangents()
    with fwd.dual_level():
        out = relu_linear_attention(*map(fwd.make_dual, leaves, tangents))
        with pytest.raises(RuntimeError) as raised:
            torch.autograd.grad(out.sum(), leaves)
    assert str(raised.value) == (
        "relu_linear_attention: a backward pass under forward-mode AD would lose the gradient's "
        "tangent; call it behind the dual level, or take backend='reference'"
    )


def test_derivatives_of_derivatives_are_refused() -> None:
    leaves, tangents = leaves_and_tangents()
    primals = tuple(t.detach() for t in leaves)

    def jvp_of(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *t: torch.func.jvp(f, t, tangents)[1]

    with pytest.raises(NotImplementedError) as refused:
        jvp_of(jvp_of(relu_linear_attention))(*primals)
    assert str(refused.value) == (
        "relu_linear_attention: a forward-mode derivative of another derivative would be lost in "
        "the fast paths; backend='reference' has derivatives of any order"
    )
    with pytest.raises(NotImplementedError, match="relu_linear_attention_jvp: a forward-mode"):
        jvp_of(lambda *t: relu_linear_attention_jvp(*t, *tangents)[1])(*primals)
    with pytest.raises(NotImplementedError, match=r"torch\.func\.grad around a forward-mode"):
        torch.func.grad(lambda q: jvp_of(relu_linear_attention)(q, *primals[1:]).sum())(primals[0])


def test_operators_keep_torchs_rules() -> None:
    leaves, tangents = leaves_and_tangents()
    settings = (1e-15, "streaming")
    opcheck(operators.forward, (*leaves, *settings))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    opcheck(operators.jvp, (*leaves, *tangents, *settings), test_utils=checks)
    opcheck(operators.jvp, (*leaves, None, None, tangents[2], *settings), test_utils=checks)
    primals = tuple(t.detach() for t in leaves)
    out, sums = operators.forward(*primals, *settings)
    opcheck(operators.backward, (*primals, sums, out, *settings))
