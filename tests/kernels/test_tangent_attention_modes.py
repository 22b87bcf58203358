"""Attention under forward-mode AD, torch.compile, checkpointing and autocast."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from attention_cases import normal, relative
from tangent_cases import tensors, true_gradients, truth
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from stillhouse_kernels import attention, attention_jvp
from stillhouse_kernels.tangent_attention import operators

NESTED = (
    "attention: a forward-mode derivative of another derivative would be lost in the fast paths; "
    "backend='reference' has derivatives of any order"
)


def causal(*qkv: Tensor, **options: Any) -> Tensor:
    return attention(*qkv, causal=True, **options)


def leaves_and_tangents(**changes: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    six = tensors(4, 2, queries=13, **changes)
    return tuple(t.requires_grad_() for t in six[:3]), tuple(six[3:])


def one_pass(leaves: tuple[Tensor, ...], tangents: tuple[Tensor, ...], **options: Any) -> Any:
    """A loss's shape in one pass: the primal carries gradients, its tangent is a constant."""
    out, out_t = torch.func.jvp(lambda *qkv: causal(*qkv, **options), leaves, tangents)
    return out, out_t.detach()


@pytest.mark.parametrize("backend", ["auto", "reference", "streaming"])
def test_jvp_and_gradients_in_one_pass(backend: str) -> None:
    leaves, tangents = leaves_and_tangents()
    out, out_t = one_pass(leaves, tangents, backend=backend)
    _, wanted_t = truth([*leaves, *tangents], causal=True)
    assert relative(out_t, wanted_t) < 1e-13
    wanted = true_gradients(leaves, out_t, causal=True)
    torch.testing.assert_close(list(torch.autograd.grad(out, leaves, out_t)), wanted)


@pytest.mark.parametrize("backend", ["auto", "streaming"])
@pytest.mark.parametrize("which", range(1, 8))
def test_any_of_the_three_may_carry_a_tangent(backend: str, which: int) -> None:
    leaves, tangents = leaves_and_tangents()
    with fwd.dual_level():
        mixed = [
            fwd.make_dual(p, t) if which >> i & 1 else p
            for i, (p, t) in enumerate(zip(leaves, tangents, strict=True))
        ]
        found = fwd.unpack_dual(causal(*mixed, backend=backend)).tangent
    zeros = [t if which >> i & 1 else torch.zeros_like(t) for i, t in enumerate(tangents)]
    assert found is not None
    assert found.norm() > 0
    assert relative(found, truth([*leaves, *zeros], causal=True)[1]) < 1e-13


def test_through_a_network_whose_later_layers_see_the_tangent() -> None:
    torch.manual_seed(0)
    projections = nn.ModuleList(nn.Linear(16, 48) for _ in range(3)).double()
    x, x_t = normal(2, 10, 16), normal(2, 10, 16, seed=1)

    def network(x: Tensor, backend: str) -> Tensor:
        for layer in projections:
            q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer(x).chunk(3, -1))
            x = x + attention(q, k, v, backend=backend).transpose(1, 2).flatten(2).tanh()
        return x

    wanted = torch.func.jvp(lambda x: network(x, "reference"), (x,), (x_t,))
    torch.testing.assert_close(torch.func.jvp(lambda x: network(x, "auto"), (x,), (x_t,)), wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
def test_jacfwd() -> None:
    leaves, _ = leaves_and_tangents()
    q, k, v = (t.detach()[:, :2, :5] for t in leaves)
    found = torch.func.jacfwd(lambda q: causal(q, k, v, backend="streaming"))(q)
    torch.testing.assert_close(found, torch.func.jacrev(lambda q: causal(q, k, v))(q))


@pytest.mark.parametrize("backend", ["auto", "streaming"])
def test_a_gradient_of_the_tangent_raises(backend: str) -> None:
    leaves, tangents = leaves_and_tangents()
    out, out_t = torch.func.jvp(lambda *qkv: causal(*qkv, backend=backend), leaves, tangents)
    message = "attention: its tangent has no gradient in the fast paths; detach the tangent"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(out.sum() + out_t.sum(), leaves)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(attention_jvp(*leaves, *tangents)[1].sum(), leaves[2])
    learnt = [t.clone().requires_grad_() for t in tangents]
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(attention_jvp(*leaves, *learnt)[1].sum(), learnt[0])
    reference = attention_jvp(*leaves, *learnt, backend="reference")[1]
    assert torch.autograd.grad(reference.sum(), learnt[0])[0].any()


def nested_jvp(f: Callable[..., Tensor], primals: Any, tangents: Any) -> Any:
    inner = lambda *qkv: torch.func.jvp(f, qkv, tangents)[1]  # noqa: E731
    return torch.func.jvp(inner, primals, tangents)


def forward_over_reverse(f: Callable[..., Tensor], primals: Any, tangents: Any) -> Any:
    gradient = torch.func.grad(lambda q: f(q, *primals[1:]).sum())
    return torch.func.jvp(gradient, primals[:1], tangents[:1])


def closed_over(f: Callable[..., Tensor], primals: Any, tangents: Any) -> Any:
    """The inner derivative is of something else: only the outer one goes through attention."""

    def outer(*qkv: Tensor) -> Tensor:
        return torch.func.jvp(lambda x: x * f(*qkv), (tangents[0],), (tangents[0],))[1]

    return torch.func.jvp(outer, primals, tangents)


def grad_in_a_dual_level(f: Callable[..., Tensor], primals: Any, tangents: Any) -> Any:
    with fwd.dual_level():
        duals = [fwd.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
        return torch.func.grad(lambda q: f(q, *duals[1:]).sum())(duals[0])


@pytest.mark.parametrize(
    "derivative", [nested_jvp, forward_over_reverse, closed_over, grad_in_a_dual_level]
)
def test_derivatives_of_derivatives_are_refused(derivative: Callable[..., Any]) -> None:
    leaves, tangents = leaves_and_tangents()
    primals = tuple(t.detach() for t in leaves)
    with pytest.raises(NotImplementedError) as refused:
        derivative(causal, primals, tangents)
    assert str(refused.value) == NESTED
    derivative(lambda *qkv: causal(*qkv, backend="reference"), primals, tangents)


def test_a_backward_pass_in_a_dual_level_raises() -> None:
    leaves, tangents = leaves_and_tangents()
    with fwd.dual_level():
        duals = [fwd.make_dual(p, t) for p, t in zip(leaves, tangents, strict=True)]
        out = causal(*duals)
        with pytest.raises(RuntimeError, match="call it behind the dual level"):
            torch.autograd.grad(out.sum(), leaves)


def test_torch_func_grad_around_a_jvp_is_refused() -> None:
    leaves, tangents = leaves_and_tangents()
    q, *rest = (t.detach() for t in leaves)
    with pytest.raises(NotImplementedError, match=r"take torch\.autograd\.grad or backward\(\)"):
        torch.func.grad(lambda q: torch.func.jvp(causal, (q, *rest), tangents)[0].sum())(q)


def test_attention_jvp_refuses_inputs_that_carry_tangents() -> None:
    leaves, tangents = leaves_and_tangents()
    primals = tuple(t.detach() for t in leaves)
    with pytest.raises(NotImplementedError, match="attention_jvp: a forward-mode derivative"):
        torch.func.jvp(lambda *qkv: attention_jvp(*qkv, *tangents)[1], primals, tangents)


def test_a_second_derivative_raises() -> None:
    leaves, tangents = leaves_and_tangents()
    for out in (causal(*leaves, backend="streaming"), attention_jvp(*leaves, *tangents)[0]):
        (grad,) = torch.autograd.grad(out.square().sum(), leaves[0], create_graph=True)
        with pytest.raises(RuntimeError, match="the fast paths have no second derivative"):
            grad.sum().backward()


COMPILED: dict[str, dict[str, Any]] = {
    "auto": {},
    "streaming": {"backend": "streaming"},
    "reference": {"backend": "reference"},
    "masked": {"mask": normal(13, 13) > -1},
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph(name: str) -> None:
    torch._dynamo.reset()
    leaves, tangents = leaves_and_tangents()
    options = COMPILED[name]

    def derive(*six: Tensor) -> Any:
        return one_pass(six[:3], six[3:], **options)

    compiled = torch.compile(derive, backend="aot_eager", fullgraph=True)
    out, out_t = compiled(*leaves, *tangents)
    wanted, wanted_t = derive(*leaves, *tangents)
    assert out_t.norm() > 0
    torch.testing.assert_close((out, out_t), (wanted, wanted_t))
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, out_t), torch.autograd.grad(wanted, leaves, out_t)
    )
    plain = torch.compile(lambda *qkv: causal(*qkv, **options), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(plain(*leaves), wanted)


def test_a_nested_jvp_is_refused_compiled_too() -> None:
    torch._dynamo.reset()
    leaves, tangents = leaves_and_tangents()
    primals = tuple(t.detach() for t in leaves)
    compiled = torch.compile(nested_jvp, backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(causal, primals, tangents)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiled_by_inductor() -> None:
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    leaves, tangents = leaves_and_tangents(dtype=torch.float32)

    def derive(*six: Tensor) -> Any:
        return one_pass(six[:3], six[3:])

    with fresh_cache():
        out, out_t = torch.compile(derive, fullgraph=True)(*leaves, *tangents)
        grads = torch.autograd.grad(out, leaves, out_t)
    wanted, wanted_t = derive(*leaves, *tangents)
    torch.testing.assert_close((out, out_t), (wanted, wanted_t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        grads, torch.autograd.grad(wanted, leaves, wanted_t), rtol=1e-4, atol=1e-4
    )


def test_operators_keep_torchs_rules() -> None:
    leaves, tangents = leaves_and_tangents()
    mask = (normal(1, 1, 13, 13) > -1).expand(1, 1, 13, 13)
    for m in (None, mask):
        settings = (m, True, 0.3, "streaming")
        opcheck(operators.forward, (*leaves, *settings))
        checks = ("test_schema", "test_autograd_registration", "test_faketensor")
        opcheck(operators.jvp, (*leaves, *tangents, *settings), test_utils=checks)
        opcheck(operators.jvp, (*leaves, None, None, tangents[2], *settings), test_utils=checks)
        primals = tuple(t.detach() for t in leaves)
        out, lse = operators.forward(*primals, *settings)
        opcheck(operators.backward, (*primals, out, lse, out, *settings))


def test_a_checkpoint_around_the_jvp() -> None:
    leaves, tangents = leaves_and_tangents()

    def derive(*six: Tensor) -> Any:
        return one_pass(six[:3], six[3:])

    run: Any = checkpoint
    out, out_t = run(derive, *leaves, *tangents, use_reentrant=False)
    wanted, wanted_t = derive(*leaves, *tangents)
    torch.testing.assert_close((out, out_t), (wanted, wanted_t))
    torch.testing.assert_close(
        torch.autograd.grad(out, leaves, out_t), torch.autograd.grad(wanted, leaves, out_t)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["auto", "reference", "streaming"])
def test_autocast_casts_as_for_sdpa(backend: str, dtype: torch.dtype) -> None:
    leaves, tangents = leaves_and_tangents(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out, out_t = one_pass(leaves, tangents, backend=backend)
        sdpa = scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
        by_hand = attention_jvp(*leaves, *tangents, causal=True, backend=backend)
    bound = 1e-12 if dtype == torch.float64 else 1e-2
    wanted, wanted_t = truth([*leaves, *tangents], causal=True)
    assert out.dtype == out_t.dtype == sdpa.dtype == by_hand[0].dtype
    assert relative(out, wanted) < bound
    assert relative(out_t, wanted_t) < 2 * bound
    torch.testing.assert_close(by_hand[1].detach(), out_t)
    assert all(g.dtype == dtype for g in torch.autograd.grad(out.float().sum(), leaves))


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
def test_without_a_tangent_it_is_sdpa() -> None:
    (q, k, v), _ = leaves_and_tangents(dtype=torch.float32)
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(causal(q, k, v), wanted)
    per_sample = torch.func.vmap(causal)(*(t.detach()[None] for t in (q, k, v)))
    torch.testing.assert_close(per_sample[0], wanted)
