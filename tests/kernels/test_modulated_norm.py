"""The modulated norm on a CPU: value, tangent and gradient against float64, and what is refused."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from memory import peak_bytes
from torch import Tensor
from torch.func import jvp
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from stillhouse_kernels.modulated_norm import (
    modulated_layer_norm,
    modulated_layer_norm_jvp,
    operators,
    streaming,
)

# torch's own, when it first loads what forward-mode AD needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

VALUES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TANGENTS = VALUES | {torch.float32: 5e-6}
GRADIENTS = VALUES | {torch.float32: 2e-5}
BACKENDS = ("reference", "streaming")
Tensors = tuple[Tensor, ...]


def plain(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Not by `layer_norm`, whose jvp of a jvp is wrong in torch 2.13."""
    shift, scale = (t.reshape(len(x), 1, -1) for t in (shift, scale))
    deviation = (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return (x - x.mean(-1, keepdim=True)) / deviation * (1 + scale) + shift


def layer_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[2:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def normal(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def dual(
    B: int = 2, N: int = 5, D: int = 12, *, dtype: torch.dtype = torch.float64, axes: int = 2
) -> tuple[Tensors, Tensors]:
    """x [B, N, D], shift and scale [B, D] or [B, 1, D], and their tangents."""
    vector = (B, D) if axes == 2 else (B, 1, D)
    sizes = ((B, N, D), vector, vector)
    drawn = [normal(*s, dtype=dtype, seed=i) for i, s in enumerate(sizes + sizes)]
    return tuple(drawn[:3]), tuple(drawn[3:])


def relative(ours: Tensor, true: Tensor) -> float:
    return float((ours.double() - true).norm() / true.norm())


def assert_close(ours: Tensors, true: Tensors, bound: float = 1e-12) -> None:
    for a, b in zip(ours, true, strict=True):
        torch.testing.assert_close(a, b, rtol=bound, atol=bound)


def of(backend: str, **options: Any) -> Callable[..., Tensor]:
    return lambda *tensors: modulated_layer_norm(*tensors, backend=backend, **options)


SHAPES = [(2, 33, 100), (1, 1, 1), (3, 1, 16), (2, 40, 600), (5, 3, 7)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_tangent_and_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several blocks: of rows of one element, and of several elements."""
    monkeypatch.setattr(streaming, "CHUNK_ENTRIES", 2500)
    monkeypatch.setattr(streaming, "SMALL_ENTRIES", 1000)
    primals, tangents = dual(*shape, dtype=dtype, axes=2 + shape[0] % 2)
    exact = tuple(t.double() for t in primals), tuple(t.double() for t in tangents)
    true, true_t = jvp(plain, *exact)
    for y, y_t in (
        jvp(of(backend), primals, tangents),
        modulated_layer_norm_jvp(*primals, *tangents, backend=backend),
    ):
        assert y.dtype == y_t.dtype == dtype
        assert relative(y, true) <= VALUES[dtype]
        assert relative(y_t, true_t) <= TANGENTS[dtype]
    grad_y = normal(*shape, dtype=dtype, seed=9)
    grads = gradients(of(backend), primals, grad_y)
    for grad, leaf, expected in zip(
        grads, primals, gradients(plain, exact[0], grad_y.double()), strict=True
    ):
        assert (grad.shape, grad.dtype) == (leaf.shape, dtype)
        assert (grad.double() - expected).norm() <= GRADIENTS[dtype] * expected.norm() + 1e-30


def gradients(function: Callable[..., Tensor], primals: Tensors, grad_y: Tensor) -> Tensors:
    leaves = [t.detach().clone().requires_grad_() for t in primals]
    return torch.autograd.grad(function(*leaves), leaves, grad_y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("present", list(product((False, True), repeat=3)), ids=str)
def test_tangents_that_are_none_are_zero(present: tuple[bool, ...], backend: str) -> None:
    primals, tangents = dual()
    given = tuple(t if has else None for t, has in zip(tangents, present, strict=True))
    zeroed = tuple(t if has else 0 * t for t, has in zip(tangents, present, strict=True))
    true = jvp(plain, primals, zeroed)
    assert_close(modulated_layer_norm_jvp(*primals, *given, backend=backend), true)
    with fwd.dual_level():
        pairs = zip(primals, given, strict=True)
        y = of(backend)(*(p if t is None else fwd.make_dual(p, t) for p, t in pairs))
        again = fwd.unpack_dual(y).tangent
    assert (again is None) == (not any(present))
    if again is not None:
        assert_close((again,), true[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangent_is_a_linear_central_difference_and_the_gradients_its_adjoint(backend: str) -> None:
    primals, tangents = dual(3, 7, 20)
    others = tuple(normal(*t.shape, seed=20 + i) for i, t in enumerate(tangents))

    def tangent(along: Tensors) -> Tensor:
        return modulated_layer_norm_jvp(*primals, *along, backend=backend)[1]

    mixed = tuple(2 * a - 3 * b for a, b in zip(tangents, others, strict=True))
    expected = 2 * tangent(tangents) - 3 * tangent(others)
    torch.testing.assert_close(tangent(mixed), expected, rtol=1e-12, atol=1e-12)
    h = 1e-5
    ahead, behind = (
        of(backend)(*(p + s * t for p, t in zip(primals, tangents, strict=True))) for s in (h, -h)
    )
    assert relative(tangent(tangents), (ahead - behind) / (2 * h)) < 1e-8
    grad_y = normal(3, 7, 20, seed=9)
    grads = gradients(of(backend), primals, grad_y)
    pulled = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    torch.testing.assert_close((grad_y * tangent(tangents)).sum(), pulled)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_be_shifted_and_so_may_their_tangents(backend: str) -> None:
    """Neither offset is seen, and the two do not multiply in the rounding."""
    (x, *vectors), (x_t, *vectors_t) = dual(2, 16, 384, dtype=torch.float32)
    exact = [t.double() for t in (x, *vectors, x_t, *vectors_t)]
    true, true_t = jvp(plain, tuple(exact[:3]), tuple(exact[3:]))
    moved = modulated_layer_norm_jvp(x + 32, *vectors, x_t + 32, *vectors_t, backend=backend)
    # A row that was moved by 32 has lost 5 bits.
    assert relative(moved[0], true) < 5e-6
    assert relative(moved[1], true_t) < 5e-6
    inputs = x.double() + 7, *exact[1:3], x_t.double() - 9, *exact[4:]
    for ours, expected in zip(
        modulated_layer_norm_jvp(*inputs, backend=backend), (true, true_t), strict=True
    ):
        assert relative(ours, expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_equal_numbers(backend: str) -> None:
    """Its variance is 0: the value is the shift, and the tangent is r = eps^-1/2 times as large."""
    (x, shift, scale), tangents = dual()
    x[0, 1], x[1, 2] = 3.0, 0.0
    y, y_t = jvp(of(backend, eps=1e-4), (x, shift, scale), tangents)
    assert torch.equal(y[0, 1], shift[0])
    x_t, shift_t, _ = tangents
    expected = 100 * (1 + scale[1]) * (x_t[1, 2] - x_t[1, 2].mean()) + shift_t[1]
    torch.testing.assert_close(y_t[1, 2], expected)
    grads = gradients(of(backend, eps=1e-4), (x, shift, scale), torch.ones_like(x))
    assert all(g.isfinite().all() for g in grads)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "expanded batch": lambda t: t[:1].expand(t.shape),
    "one of six": lambda t: torch.cat([t] * 6, -1).chunk(6, -1)[2],
    "rows apart": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_inputs_and_tangents(layout: str, axes: int, backend: str) -> None:
    primals, tangents = dual(axes=axes)
    relaid = tuple(LAYOUTS[layout](t) for t in (*primals, *tangents))
    compact = tuple(t.contiguous() for t in relaid)
    true = jvp(plain, compact[:3], compact[3:])
    assert_close(modulated_layer_norm_jvp(*relaid, backend=backend), true)
    assert_close(jvp(of(backend), compact[:3], relaid[3:]), true)
    grad_y = LAYOUTS[layout](normal(2, 5, 12, seed=9))
    grads = gradients(of(backend), relaid[:3], grad_y)
    assert_close(grads, gradients(plain, compact[:3], grad_y))


def step(*tensors: Tensor) -> Tensors:
    """y and its tangent, of three primals and their tangents.

    Detached: a compiler asks for the gradients of all that comes out attached.
    """
    y, y_t = jvp(of("streaming"), tensors[:3], tensors[3:])
    return y, y_t.detach()


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_compiled_tangent_is_the_eager_one(dynamic: bool) -> None:
    torch.compiler.reset()
    primals, tangents = dual()
    leaves = [t.requires_grad_() for t in primals]
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    ours, expected = compiled(*leaves, *tangents), step(*leaves, *tangents)
    assert ours[1].norm() > 1
    assert_close(ours, expected, 0)
    grads = (torch.autograd.grad(y.square().sum(), leaves) for y, _ in (ours, expected))
    assert_close(*grads, 0)


def test_checkpoint_around_a_jvp() -> None:
    primals, tangents = dual()
    leaves = [t.requires_grad_() for t in primals]
    ours = checkpoint(step, *leaves, *tangents, use_reentrant=False)
    expected = step(*leaves, *tangents)
    assert_close(ours, expected, 0)
    grads = (torch.autograd.grad(y.square().sum(), leaves) for y, _ in (ours, expected))
    assert_close(*grads, 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_computes_in_float32(backend: str) -> None:
    """Also where the condition comes out of a linear layer in 16 bits, and x does not."""
    (x, shift, scale), (x_t, shift_t, scale_t) = dual(dtype=torch.bfloat16)
    mixed = (x.float(), shift, scale), (x_t.float(), shift_t, scale_t)
    exact = tuple(t.float() for t in mixed[0]), tuple(t.float() for t in mixed[1])
    expected = jvp(of(backend), *exact)
    with torch.autocast("cpu", torch.bfloat16):
        for primals, tangents in (mixed, ((x, shift, scale), (x_t, shift_t, scale_t))):
            for ours in (
                jvp(of(backend), primals, tangents),
                modulated_layer_norm_jvp(*primals, *tangents, backend=backend),
            ):
                assert ours[0].dtype == ours[1].dtype == torch.float32
                assert relative(ours[0], expected[0]) < 1e-6
                assert relative(ours[1], expected[1]) < 1e-6


def test_a_gradient_of_the_tangent_raises() -> None:
    primals, tangents = dual()
    leaves = tuple(t.requires_grad_() for t in primals)
    _, y_t = jvp(of("streaming"), leaves, tangents)
    _, again = modulated_layer_norm_jvp(*leaves, *tangents)
    for tangent in (y_t, again):
        with pytest.raises(RuntimeError, match="its tangent has no gradient in the fast paths"):
            tangent.sum().backward()


def test_a_second_derivative_raises() -> None:
    leaves = tuple(t.requires_grad_() for t in dual()[0])
    y = modulated_layer_norm(*leaves)
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="the fast paths have no second derivative"):
        grad.sum().backward()


def test_a_backward_pass_in_a_dual_level_raises() -> None:
    primals, tangents = dual()
    x = primals[0].requires_grad_()
    with fwd.dual_level():
        y = modulated_layer_norm(fwd.make_dual(x, tangents[0]), *primals[1:])
        with pytest.raises(RuntimeError, match="would lose the gradient's tangent"):
            torch.autograd.grad(y.sum(), x)


NESTED: dict[str, Callable[[Callable[..., Tensor], Tensor], Any]] = {
    "jvp of jvp": lambda f, x: jvp(lambda u: jvp(f, (u,), (x,))[1], (x,), (x,)),
    "jvp of grad": lambda f, x: jvp(torch.func.grad(lambda u: f(u).square().sum()), (x,), (x,)),
    "grad of jvp": lambda f, x: torch.func.grad(lambda u: jvp(f, (u,), (x,))[0].square().sum())(x),
}


@pytest.mark.parametrize("nesting", NESTED)
def test_nested_derivatives_are_refused_or_right(nesting: str) -> None:
    """The fast paths refuse; the reference has any order."""
    (x, *vectors), _ = dual()
    with pytest.raises(NotImplementedError, match=r"layer_norm: .* backend='reference'"):
        NESTED[nesting](lambda u: modulated_layer_norm(u, *vectors), x)
    ours = NESTED[nesting](lambda u: of("reference")(u, *vectors), x)
    true = NESTED[nesting](lambda u: plain(u, *vectors), x)
    torch.testing.assert_close(ours, true)


def test_inputs_of_the_derivative_carry_no_tangents() -> None:
    primals, _ = dual()
    with pytest.raises(NotImplementedError, match="modulated_layer_norm_jvp: a forward-mode"):
        jvp(lambda *p: modulated_layer_norm_jvp(*p)[0], primals, primals)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_operators_pass_torchs_own_check(dtype: torch.dtype) -> None:
    primals, tangents = dual(dtype=dtype)
    leaves = tuple(t.requires_grad_() for t in primals)
    rest = (1e-6, "streaming")
    opcheck(operators.forward, (*leaves, *rest))
    # Differentiating the tangent raises, as it should.
    checks = ("test_schema", "test_faketensor")
    opcheck(operators.jvp, (*leaves, *tangents, *rest), test_utils=checks)
    opcheck(operators.jvp, (*leaves, None, tangents[1], None, *rest), test_utils=checks)
    x, shift, scale = (t.detach() for t in primals)
    _, mean, rstd = operators.forward(x, shift, scale, *rest)
    opcheck(operators.backward, (x, scale, mean, rstd, x, "streaming"))


def test_memory_is_that_of_the_results_and_a_chunk() -> None:
    primals, tangents = dual(1, 1024, 384, dtype=torch.float32)
    results = 2 * primals[0].nbytes + 2 * 1024 * 4
    chunk = 4 * streaming.CHUNK_ENTRIES * torch.get_num_threads()
    ours = peak_bytes(lambda: modulated_layer_norm_jvp(*primals, *tangents))
    assert ours < results + 3 * chunk
    assert 2 * ours < peak_bytes(lambda: jvp(layer_norm, primals, tangents))


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as e:
        call()
    return str(e.value)


def sized(x: Any = (2, 5, 8), shift: Any = (2, 8), scale: Any = (2, 8)) -> Tensors:
    """Zeros of these sizes, or the tensors themselves."""
    return tuple(t if isinstance(t, Tensor) else torch.zeros(t) for t in (x, shift, scale))


FORMS = "[batch, width] or [batch, 1, width] = (2, 8) or (2, 1, 8)"
BAD: dict[str, tuple[Tensors, dict[str, Any], str]] = {
    "two axes": (sized((5, 8)), {}, "x (5, 8): expected [batch, tokens, width], no size 0"),
    "no tokens": (sized((2, 0, 8)), {}, "x (2, 0, 8): expected [batch, tokens, width], no size 0"),
    "a shift for each token": (
        sized(shift=(2, 5, 8)),
        {},
        f"shift (2, 5, 8), x (2, 5, 8): expected shift {FORMS}",
    ),
    "one scale": (sized(scale=(8,)), {}, f"scale (8,), x (2, 5, 8): expected scale {FORMS}"),
    "dtypes": (
        sized(scale=torch.zeros(2, 8).half()),
        {},
        "x torch.float32, shift torch.float32, scale torch.float16: expected one floating-point "
        "dtype; cast with .to()",
    ),
    "devices": (
        sized(scale=torch.zeros(2, 8).to("meta")),
        {},
        "x on cpu, shift on cpu, scale on meta: expected one device; move with .to()",
    ),
    "eps": (sized(), {"eps": -1e-6}, "eps=-1e-06: expected 0 or more"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_in_one_line(case: str) -> None:
    tensors, options, message = BAD[case]
    for function in (modulated_layer_norm, modulated_layer_norm_jvp):
        said = refusal(lambda function=function: function(*tensors, **options))
        assert said == f"{function.__name__}: {message}"


def test_tangents_fit_their_primals() -> None:
    (x, shift, scale), (x_t, _, scale_t) = dual(dtype=torch.float32)
    given = (x, shift, scale, x_t)
    assert refusal(lambda: modulated_layer_norm_jvp(*given, None, scale_t[:, None])) == (
        "modulated_layer_norm_jvp: scale_t (2, 1, 12), scale (2, 12): expected a tangent of its "
        "primal's shape"
    )
    assert refusal(lambda: modulated_layer_norm_jvp(*given[:3], x_t.double())) == (
        "modulated_layer_norm_jvp: x_t torch.float64 on cpu, x torch.float32 on cpu: expected its "
        "primal's dtype and device; convert with .to()"
    )


def test_backends_are_taken_or_refused() -> None:
    primals, _ = dual()
    assert refusal(lambda: modulated_layer_norm(*primals, backend="cuda")) == (
        "backend='cuda': expected one of auto, reference, streaming, triton"
    )
    pytest.importorskip("triton")
    assert refusal(lambda: modulated_layer_norm(*primals, backend="triton")) == (
        "backend='triton': the dtype of x is float64, the kernel takes float32, float16, bfloat16; "
        "backend='streaming' takes it"
    )
