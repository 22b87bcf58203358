"""ReLU linear attention and its tangent, on the CPU, against torch's own jvp of the formula."""

from collections.abc import Callable, Sequence
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from attention_cases import normal, relative
from memory import peak_bytes
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from stillhouse_kernels.linear_attention import (
    operators,
    relu_linear_attention,
    relu_linear_attention_jvp,
    streaming,
)

# torch's own, when it first loads what forward-mode AD needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

# Relative in norm to float64: values, tangents, gradients.
TOLERANCES = {
    torch.float64: (1e-13, 1e-13, 1e-13),
    torch.float32: (2e-6, 5e-6, 2e-5),
    torch.float16: (1e-3, 1e-3, 1e-3),
    torch.bfloat16: (1e-2, 1e-2, 1e-2),
}
BACKENDS = ["reference", "streaming"]
# h, h_kv, N, M, d, e
SHAPES = {
    "square": (3, 3, 40, 40, 8, 8),
    "grouped, of other lengths and widths": (6, 2, 50, 23, 12, 20),
    "few queries": (2, 1, 1, 60, 16, 4),
}
Six = Sequence[Tensor]


def plain(q: Tensor, k: Tensor, v: Tensor, eps: float = 1e-15) -> Tensor:
    """The formula, without a line of the package."""
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    weights = q.relu() @ k.relu().mT
    return (weights @ v) / (weights.sum(-1, keepdim=True) + eps)


def draw(
    shape: tuple[int, ...] = SHAPES["grouped, of other lengths and widths"],
    dtype: torch.dtype = torch.float64,
    batch: int = 2,
) -> list[Tensor]:
    """q, k, v and their tangents."""
    h, g, queries, keys, d, e = shape
    shapes = [(batch, h, queries, d), (batch, g, keys, d), (batch, g, keys, e)]
    return [normal(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes + shapes)]


def truth(six: Six) -> tuple[Tensor, Tensor]:
    # torch takes no expanded tensors here.
    wide = [t.detach().double().contiguous() for t in six]
    return torch.func.jvp(plain, tuple(wide[:3]), tuple(wide[3:]))


def true_gradients(three: Six, grad_out: Tensor) -> list[Tensor]:
    leaves = [t.detach().double().requires_grad_() for t in three]
    return list(torch.autograd.grad(plain(*leaves), leaves, grad_out.double()))


def leaves_and_tangents(**changes: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    six = draw(**changes)
    return tuple(t.requires_grad_() for t in six[:3]), tuple(six[3:])


def inner(ours: Six, theirs: Six) -> float:
    return sum((a.double() * b.double()).sum().item() for a, b in zip(ours, theirs, strict=True))


@pytest.fixture(params=["one chunk", "many chunks"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "many chunks":
        monkeypatch.setattr(streaming, "CHUNK_ENTRIES", 200)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
def test_agrees_with_float64(shape: tuple[int, ...], backend: str, dtype: torch.dtype) -> None:
    for_values, for_tangents, for_gradients = TOLERANCES[dtype]
    leaves, tangents = leaves_and_tangents(shape=shape, dtype=dtype)
    wanted, wanted_t = truth([*leaves, *tangents])
    out = relu_linear_attention(*leaves, backend=backend)
    grads = torch.autograd.grad(out, leaves, wanted.to(dtype))
    for value, tangent in (
        torch.func.jvp(lambda *t: relu_linear_attention(*t, backend=backend), leaves, tangents),
        relu_linear_attention_jvp(*leaves, *tangents, backend=backend),
    ):
        assert value.dtype == tangent.dtype == out.dtype == dtype
        assert relative(value, wanted) < for_values
        assert relative(tangent, wanted_t) < for_tangents
    assert relative(out, wanted) < for_values
    for grad, true in zip(grads, true_gradients(leaves, wanted.to(dtype)), strict=True):
        assert grad.dtype == dtype
        assert relative(grad, true) < for_gradients


@pytest.mark.parametrize("entries", [50, 100, 200, 1000])
def test_several_heads_or_elements_of_the_batch_make_a_chunk(
    entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHUNK_ENTRIES", entries)
    six = draw((4, 4, 5, 7, 4, 4), batch=5)
    torch.testing.assert_close(relu_linear_attention_jvp(*six), truth(six))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("present", list(product((False, True), repeat=3)), ids=str)
def test_a_tangent_that_is_none_is_zero(present: tuple[bool, ...], backend: str) -> None:
    six = draw()
    kept = [t if has else None for t, has in zip(six[3:], present, strict=True)]
    zeros = [t * has for t, has in zip(six[3:], present, strict=True)]
    wanted, wanted_t = truth([*six[:3], *zeros])
    out, out_t = relu_linear_attention_jvp(*six[:3], *kept, backend=backend)
    torch.testing.assert_close((out, out_t), (wanted, wanted_t))
    assert out_t.any() == any(present)
    with fwd.dual_level():
        mixed = [
            t if t_t is None else fwd.make_dual(t, t_t)
            for t, t_t in zip(six[:3], kept, strict=True)
        ]
        found = fwd.unpack_dual(relu_linear_attention(*mixed, backend=backend)).tangent
    assert (found is not None) == any(present)
    if found is not None:
        torch.testing.assert_close(found, wanted_t)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangent_is_linear_in_the_direction(backend: str) -> None:
    six, others = draw(), [normal(*t.shape, seed=10 + i) for i, t in enumerate(draw()[3:])]
    sums = [2 * a - 3 * b for a, b in zip(six[3:], others, strict=True)]
    first, second, both = (
        relu_linear_attention_jvp(*six[:3], *tangents, backend=backend)[1]
        for tangents in (six[3:], others, sums)
    )
    torch.testing.assert_close(both, 2 * first - 3 * second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_are_adjoint(backend: str) -> None:
    """<G, Ȯ> = <dq, q̇> + <dk, k̇> + <dv, V̇>."""
    leaves, tangents = leaves_and_tangents()
    out, out_t = relu_linear_attention_jvp(*leaves, *tangents, backend=backend)
    grad_out = normal(*out.shape, seed=9)
    grads = torch.autograd.grad(out, leaves, grad_out)
    assert inner([grad_out], [out_t]) == pytest.approx(inner(grads, tangents), rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_central_difference_away_from_the_kink(backend: str) -> None:
    six = draw()
    q, k = (t + 0.05 * t.sign() for t in six[:2])
    primals, h = [q, k, six[2]], 1e-5
    _, out_t = relu_linear_attention_jvp(*primals, *six[3:], backend=backend)
    ahead, behind = (
        relu_linear_attention(
            *(p + sign * h * t for p, t in zip(primals, six[3:], strict=True)), backend=backend
        )
        for sign in (1, -1)
    )
    assert relative((ahead - behind) / (2 * h), out_t) < 1e-8


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_above_zero_has_no_tangent(backend: str) -> None:
    six = draw()
    six[0][..., ::3], six[1][..., ::4] = 0, 0
    out_t = relu_linear_attention_jvp(*six, backend=backend)[1]
    masked = [t * (p > 0) for p, t in zip(six[:2], six[3:5], strict=True)]
    torch.testing.assert_close(
        relu_linear_attention_jvp(*six[:3], *masked, six[5], backend=backend)[1], out_t
    )
    torch.testing.assert_close(out_t, truth(six)[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_may_come_in_any_order_and_heads_at_any_scale(backend: str) -> None:
    six = draw()
    wanted = relu_linear_attention_jvp(*six, backend=backend)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(0))
    shuffled = [t[:, :, order] if t.shape[2] == 23 else t for t in six]
    torch.testing.assert_close(relu_linear_attention_jvp(*shuffled, backend=backend), wanted)
    scaled = [t * (1e3, 1e-2, 1)[i % 3] for i, t in enumerate(six)]
    torch.testing.assert_close(relu_linear_attention_jvp(*scaled, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_key_gives_its_value(backend: str) -> None:
    q, k, v, q_t, k_t, v_t = draw((2, 2, 9, 1, 6, 4))
    k = k.abs()
    out, out_t = relu_linear_attention_jvp(q.abs(), k, v, q_t, k_t, v_t, backend=backend)
    torch.testing.assert_close(out, v.expand(out.shape))
    torch.testing.assert_close(out_t, v_t.expand(out.shape))


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_meets_no_key(backend: str, dtype: torch.dtype) -> None:
    """Its row is 0, and so are its tangent and its gradients, as those of the formula are."""
    leaves, tangents = leaves_and_tangents(dtype=dtype)
    with torch.no_grad():
        leaves[0][:, :, 3] = -leaves[0][:, :, 3].abs()  # Q is 0
        leaves[1][..., 0] = -leaves[1][..., 0].abs()
        leaves[0][:, :, 5] = -leaves[0][:, :, 5].abs()
        leaves[0][:, :, 5, 0] = 2  # where K is 0
    out, out_t = torch.func.jvp(
        lambda *t: relu_linear_attention(*t, backend=backend), leaves, tangents
    )
    wanted, wanted_t = truth([*leaves, *tangents])
    for row in (3, 5):
        for t in (out, out_t, wanted, wanted_t):
            assert torch.equal(t[:, :, row], torch.zeros_like(t[:, :, row]))
    for_values, for_tangents, for_gradients = TOLERANCES[dtype]
    assert relative(out, wanted) < for_values
    assert relative(out_t, wanted_t) < for_tangents
    grads = torch.autograd.grad(out, leaves, torch.ones_like(out))
    true = true_gradients(leaves, torch.ones_like(out))
    assert not grads[0][:, :, [3, 5]].any()
    for grad, wanted in zip(grads, true, strict=True):
        assert relative(grad, wanted) < for_gradients


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_a_number_is_not_taken_for_zero(backend: str) -> None:
    six = draw()
    six[0][0, 0, 3, 0], six[1][1, 0, 5, 0] = torch.nan, torch.nan
    for t in relu_linear_attention_jvp(*six, backend=backend):
        assert t[0, 0, 3].isnan().all()
        assert t[1, :3].isnan().all()
        assert not t[0, 1:].isnan().any()


@pytest.mark.parametrize("offset", [1, 16])
def test_what_all_values_share_costs_no_digits(offset: float) -> None:
    """Torch's own jvp of the formula has an error of 1e-4 where the offset is 16."""
    six = draw((2, 2, 40, 2000, 32, 32), torch.float32)
    six[2] += offset
    out, out_t = relu_linear_attention_jvp(*six)
    wanted, wanted_t = truth(six)
    assert relative(out, wanted) < 2e-7
    assert relative(out_t, wanted_t) < 5e-7


def test_eps_is_what_it_is_called() -> None:
    leaves, tangents = leaves_and_tangents()
    wanted = torch.func.jvp(lambda *t: plain(*t, eps=0.5), leaves, tangents)
    true = torch.autograd.grad(wanted[0], leaves, tangents[2].new_ones(wanted[0].shape))
    for backend in BACKENDS:
        out, out_t = relu_linear_attention_jvp(*leaves, *tangents, eps=0.5, backend=backend)
        torch.testing.assert_close((out, out_t), wanted)
        torch.testing.assert_close(torch.autograd.grad(out, leaves, torch.ones_like(out)), true)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "tokens first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "columns first": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[:, :, :1].expand(t.shape),
    "every other": lambda t: torch.stack([t, -t], -1).flatten(-2)[..., ::2],
}


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tensors_of_any_layout(layout: str) -> None:
    six = draw()
    laid = [LAYOUTS[layout](t) for t in six]
    for given in ([*six[:3], *laid[3:]], [*laid[:3], *six[3:]]):
        torch.testing.assert_close(
            relu_linear_attention_jvp(*given, backend="streaming"), truth(given)
        )
    leaves = [t.requires_grad_() for t in laid[:3]]
    out = relu_linear_attention(*leaves, backend="streaming")
    grad_out = LAYOUTS[layout](normal(*out.shape, seed=9))
    torch.testing.assert_close(
        list(torch.autograd.grad(out, leaves, grad_out)), true_gradients(leaves, grad_out)
    )


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


def test_no_array_of_the_length_of_queries_or_keys_but_the_results() -> None:
    six = draw((4, 4, 2048, 2048, 32, 32), torch.float32, batch=1)
    results = 2 * six[0].nbytes
    peak = peak_bytes(lambda: relu_linear_attention_jvp(*six))
    assert results <= peak < results + 2 * 4 * streaming.CHUNK_ENTRIES


def test_equals_the_processor_of_diffusers() -> None:
    """With projections that hand on what they are given."""
    processors = pytest.importorskip("diffusers.models.attention_processor")
    q, k, v = (t.float() for t in draw((4, 4, 30, 30, 8, 8))[:3])
    given = {"q": q, "k": k, "v": v}

    def projection(name: str) -> Callable[[Tensor], Tensor]:
        return lambda _: given[name].transpose(1, 2).flatten(2)

    attn = SimpleNamespace(
        to_q=projection("q"), to_k=projection("k"), to_v=projection("v"),
        norm_q=None, norm_k=None, heads=4, to_out=[lambda t: t, lambda t: t],
    )  # fmt: skip
    wanted = processors.SanaLinearAttnProcessor2_0()(attn, torch.zeros(2, 30, 32))
    for backend in BACKENDS:
        out = relu_linear_attention(q, k, v, backend=backend)
        assert relative(out.transpose(1, 2).flatten(2), wanted) < 1e-6


def refusal(*six: Tensor, **options: Any) -> list[str]:
    """What both functions say, or the one that takes tangents."""
    calls = [lambda: relu_linear_attention_jvp(*six, **options)]
    if len(six) == 3:
        calls.append(lambda: relu_linear_attention(*six, **options))
    said = []
    for call in calls:
        with pytest.raises(ValueError, match=":") as refused:
            call()
        said.append(str(refused.value))
    names = ("relu_linear_attention_jvp: ", "relu_linear_attention: ")
    return [message.removeprefix(name) for message, name in zip(said, names, strict=False)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: normal(2, 6, 12)},
            "q (2, 6, 12), k (2, 2, 23, 12), v (2, 2, 23, 20): expected [batch, heads, tokens, "
            "head_dim] each, no size 0",
        ),
        (
            {1: normal(2, 2, 23, 11)},
            "q (2, 6, 50, 12), k (2, 2, 23, 11), v (2, 2, 23, 20): expected one batch size, and "
            "one head dim in q and k",
        ),
        (
            {2: normal(2, 2, 22, 20)},
            "q (2, 6, 50, 12), k (2, 2, 23, 12), v (2, 2, 22, 20): expected k and v of equal heads "
            "and tokens",
        ),
        (
            {0: normal(2, 5, 50, 12)},
            "q (2, 5, 50, 12), k (2, 2, 23, 12), v (2, 2, 23, 20): 2 key/value heads do not divide "
            "5 query heads",
        ),
        (
            {1: normal(2, 2, 23, 12, dtype=torch.float32)},
            "q torch.float64, k torch.float32, v torch.float64: expected one floating-point dtype; "
            "cast with .to()",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[int, Tensor], message: str) -> None:
    three = [change.get(i, t) for i, t in enumerate(draw()[:3])]
    assert set(refusal(*three)) == {message}


@pytest.mark.parametrize("eps", [0.0, -1e-15, 1e-31, 2.0, float("nan")])
def test_an_eps_that_float32_does_not_hold_is_refused(eps: float) -> None:
    assert set(refusal(*draw()[:3], eps=eps)) == {
        f"eps={eps!r}: expected a number from 1e-30 to 1; it keeps a row that sees no key from "
        "dividing by 0"
    }


def test_a_backend_that_is_unknown_or_cannot_run_is_refused() -> None:
    three = draw()[:3]
    assert set(refusal(*three, backend="flash")) == {
        "backend='flash': expected one of auto, reference, streaming, triton"
    }
    pytest.importorskip("triton")
    assert set(refusal(*three, backend="triton")) == {
        "backend='triton': the dtype of q is float64, the kernel takes float32, float16, bfloat16; "
        "backend='streaming' takes it"
    }


def test_a_tangent_that_does_not_fit_its_primal_is_refused() -> None:
    six = draw()
    assert refusal(*six[:4], six[4][:, :1], six[5]) == [
        "k_t (2, 1, 23, 12), k (2, 2, 23, 12): expected a tangent of its primal's shape"
    ]
    assert refusal(*six[:5], six[5].float()) == [
        "v_t torch.float32 on cpu, v torch.float64 on cpu: expected its primal's dtype and device; "
        "convert with .to()"
    ]
