"""The Triton kernels of the modulated norm, in the interpreter, against a few lines in float64."""

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from stillhouse_kernels.modulated_norm import kernel, launch, modulated_layer_norm

# torch's own, when it first loads what forward-mode AD needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

VALUES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TANGENTS = VALUES | {torch.float32: 5e-6}
GRADIENTS = VALUES | {torch.float32: 2e-5}
EPS = 1e-5
PYTHON_TYPE = {"i32": int, "fp32": float}
# Where there is a GPU, conftest leaves the interpreter off.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel does not write is NaN."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> Tensor:
        made = empty(*size, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)


def scattered(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Random [B, N, D] or [B, D] as a view into a larger storage full of NaN.

    Strides and address are multiples of 16: where D is too, the kernels read it in place.
    """
    # Another storage for every seed, hence other strides.
    around = *(size + 1 + seed for size in shape[:-1]), 16 * (2 + seed + shape[-1] // 16)
    storage = torch.full(around, torch.nan, dtype=dtype, device=DEVICE)
    inner = *(slice(1, 1 + size) for size in shape[:-1]), slice(16, 16 + shape[-1])
    generator = torch.Generator().manual_seed(seed)
    return storage[inner].copy_(torch.randn(shape, generator=generator))


class Dual(NamedTuple):
    """Inputs and their tangents."""

    x: Tensor
    shift: Tensor
    scale: Tensor
    x_t: Tensor | None
    shift_t: Tensor | None
    scale_t: Tensor | None


def dual(B: int, N: int, D: int, dtype: torch.dtype = torch.float32) -> Dual:
    shapes = ((B, N, D), (B, D), (B, D))
    return Dual(*(scattered(*s, dtype=dtype, seed=i) for i, s in enumerate(shapes + shapes)))


class Results(NamedTuple):
    y: Tensor
    y_t: Tensor
    mean: Tensor
    rstd: Tensor
    grads: tuple[Tensor, ...]


def plain(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[2:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]


def truth(of: Dual, grad_y: Tensor) -> Results:
    """In float64, by forward-mode AD and by autograd."""
    primals = tuple(t.double().requires_grad_() for t in of[:3])
    tangents = tuple(
        torch.zeros_like(p) if t is None else t.double()
        for p, t in zip(primals, of[3:], strict=True)
    )
    y, y_t = torch.func.jvp(plain, primals, tangents)
    grads = torch.autograd.grad(y, primals, grad_y.double())
    x = primals[0].detach()
    rstd = (x.var(-1, correction=0) + EPS).rsqrt()
    return Results(y.detach(), y_t.detach(), x.mean(-1), rstd, grads)


def launched(of: Dual, grad_y: Tensor) -> Results:
    y, y_t, mean, rstd = launch.jvp(*of, EPS)
    alone = launch.forward(*of[:3], EPS)
    for ours, again in zip((y, mean, rstd), alone, strict=True):
        torch.testing.assert_close(again, ours)
    grads = launch.backward(of.x, of.scale, mean, rstd, grad_y)
    return Results(y, y_t, mean, rstd, grads)


def assert_close(ours: Tensor, true: Tensor, bound: float, dtype: torch.dtype) -> None:
    assert (ours.shape, ours.dtype) == (true.shape, dtype)
    assert ours.is_contiguous()
    assert (ours.double() - true).norm() <= bound * true.norm()


def check(of: Dual, grad_y: Tensor | None = None) -> Results:
    dtype = of.x.dtype
    if grad_y is None:
        grad_y = scattered(*of.x.shape, dtype=dtype, seed=6)
    ours, true = launched(of, grad_y), truth(of, grad_y)
    assert_close(ours.y, true.y, VALUES[dtype], dtype)
    assert_close(ours.y_t, true.y_t, TANGENTS[dtype], dtype)
    assert_close(ours.mean, true.mean, 2e-6, torch.float32)
    assert_close(ours.rstd, true.rstd, 2e-6, torch.float32)
    for grad, expected in zip(ours.grads, true.grads, strict=True):
        assert_close(grad, expected, GRADIENTS[dtype], dtype)
    return ours


@pytest.mark.parametrize("dtype", VALUES, ids=str)
def test_dual_equals_float64_in_every_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tails in every axis, every tensor with strides of its own; a program takes 32 rows, or 1."""
    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    check(dual(2, 33, 100, dtype))


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 1, 512), (1, 3, 513), (2, 2, 1152)], ids=str)
def test_awkward_sizes(shape: tuple[int, int, int]) -> None:
    check(dual(*shape))


def test_the_widest_row() -> None:
    check(dual(1, 1, kernel.MAX_WIDTH))


@pytest.mark.parametrize("present", list(product((False, True), repeat=3)), ids=str)
def test_tangents_that_are_none(present: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """They count as zeros, which take the memory of a row."""
    run, given = launch._run, {}

    def record(function: Any, x: Tensor, width: int, arguments: dict[str, Any]) -> None:
        given.setdefault(function.__name__, arguments)
        run(function, x, width, arguments)

    monkeypatch.setattr(launch, "_run", record)
    of = dual(2, 3, 20)
    tangents = [t if has else None for t, has in zip(of[3:], present, strict=True)]
    ours = check(Dual(*of[:3], *tangents))
    assert ours.y_t.any() == any(present)
    for name, has in zip(("x", "shift", "scale"), present, strict=True):
        read = given["norm_forward"][f"{name}_t_ptr"]
        assert has or read.untyped_storage().nbytes() == 32 * 4


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "expanded": lambda t: t[..., :1].expand(t.shape),
    "expanded batch": lambda t: t[:1].expand(t.shape),
    "one of six": lambda t: torch.cat([t] * 6, -1).chunk(6, -1)[2],
    "rows of 19": lambda t: F.pad(t, (0, 3))[..., :-3],
    "odd address": lambda t: F.pad(t.flatten(), (1, 0))[1:].view(t.shape),
}


def relaid(of: Dual, layout: str) -> Dual:
    return Dual(*(LAYOUTS[layout](t) for t in of))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_taken(layout: str) -> None:
    of = dual(2, 5, 16)
    # `relaid` leaves no NaN between the numbers: they would be the tensor's own.
    check(relaid(of, layout), LAYOUTS[layout](scattered(2, 5, 16, dtype=torch.float32, seed=6)))


def test_offsets_do_not_multiply_in_the_rounding() -> None:
    of = dual(1, 4, 384)
    assert of.x_t is not None
    moved = of._replace(x=of.x + 32, x_t=of.x_t + 32)
    grad_y = torch.zeros_like(of.x)
    true, ours = truth(moved, grad_y), launched(moved, grad_y)
    assert_close(ours.y, true.y, 2e-6, torch.float32)
    assert_close(ours.y_t, true.y_t, 5e-6, torch.float32)


def test_a_row_of_equal_numbers() -> None:
    """Its variance is 0, and all there is to divide by is eps."""
    of = dual(1, 3, 20)
    of.x[0, 1] = 3.0
    check(of)
    assert torch.equal(launch.forward(*of[:3], EPS)[0][0, 1], of.shift[0])


def test_result_does_not_depend_on_the_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values to the bit, as no row meets another; sums over rows to a rounding."""
    of, grad_y = dual(2, 11, 24), scattered(2, 11, 24, dtype=torch.float32, seed=6)
    ours = launched(of, grad_y)
    monkeypatch.setattr(kernel, "PROGRAMS", 1)
    regrouped = launched(of, grad_y)
    for a, b in zip(ours[:4], regrouped[:4], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(ours.grads[0], regrouped.grads[0])
    for a, b in zip(ours.grads[1:], regrouped.grads[1:], strict=True):
        assert_close(a, b.double(), 1e-6, torch.float32)


@pytest.mark.parametrize(
    ("batch", "tokens", "block_rows", "rows"),
    [(1, 1, 2, 2), (1, 1024, 1, 2), (4, 4096, 1, 32), (1, 4096, 2, 8), (10**6, 1, 1, 32)],
)
def test_programs_are_many_and_have_few_rows(
    batch: int, tokens: int, block_rows: int, rows: int
) -> None:
    assert kernel.rows_of_a_program(batch, tokens, block_rows) == rows


def test_the_public_function_reaches_the_kernels() -> None:
    of = dual(2, 3, 20)
    primals, tangents = (tuple(t for t in ts if t is not None) for ts in (of[:3], of[3:]))
    leaves = tuple(t.clone().requires_grad_() for t in primals)

    def function(*tensors: Tensor) -> Tensor:
        return modulated_layer_norm(*tensors, eps=EPS, backend="triton")

    grad_y = scattered(2, 3, 20, dtype=torch.float32, seed=6)
    true = truth(of, grad_y)
    y, y_t = torch.func.jvp(function, leaves, tangents)
    assert_close(y.detach(), true.y, 2e-6, torch.float32)
    assert_close(y_t.detach(), true.y_t, 5e-6, torch.float32)
    for grad, expected in zip(torch.autograd.grad(y, leaves, grad_y), true.grads, strict=True):
        assert_close(grad, expected, 2e-5, torch.float32)


def test_refusal_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch.refusal(torch.zeros(1, 1, 8192, dtype=torch.bfloat16)) is None
    assert launch.refusal(torch.zeros(1, 1, 8193)) == (
        "the width is 8193, the kernel takes at most 8192"
    )
    assert launch.refusal(torch.zeros(1, 1, 8, dtype=torch.float64)) == (
        "the dtype of x is float64, the kernel takes float32, float16, bfloat16"
    )
    monkeypatch.setattr(launch, "compute_capability", lambda _: 75)
    assert launch.refusal(torch.zeros(1, 1, 8)) == (
        "cpu has compute capability 7.5, the kernel needs 8.0"
    )


def recorded(monkeypatch: pytest.MonkeyPatch, duals: list[Dual]) -> list[tuple[str, dict]]:
    """The arguments of all launches, by kernel; nothing runs."""
    given: list[tuple[str, dict[str, Any]]] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int]) -> Any:
            return lambda **arguments: given.append((self.name, arguments))

    for name in ("norm_forward", "norm_backward"):
        monkeypatch.setattr(kernel, name, Recorder(name))
    for of in duals:
        y, *_, mean, rstd = launch.jvp(*of, EPS)
        launch.forward(*of[:3], EPS)
        launch.backward(of.x, of.scale, mean, rstd, y)
    return given


def test_what_is_launched_is_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """In its arguments and in what of them are multiples of 16, for any width and layout."""
    compiled = {c.kernel.__name__: c for c in kernel.compilations(90)}
    duals = [dual(2, 5, 20), dual(2, 5, 1)._replace(x_t=None, scale_t=None)]
    duals += [relaid(dual(2, 5, 16), layout) for layout in LAYOUTS]
    given = recorded(monkeypatch, duals)
    assert len(given) == 3 * len(duals)
    for name, arguments in given:
        of = compiled[name]
        options = {"num_warps", "num_stages"}
        assert arguments.keys() - options == of.signature.keys() | of.constexprs.keys()
        for argument, triton_type in of.signature.items():
            value = arguments[argument]
            assert isinstance(value, PYTHON_TYPE.get(triton_type, Tensor)), argument
            if argument.endswith("_ptr"):
                assert value.data_ptr() % 16 == 0, argument
            if argument in of.divisible:
                assert value % 16 == 0, argument


def test_every_width_has_a_configuration() -> None:
    for width in (1, 100, 512, 513, 1152, 2240, 5120, kernel.MAX_WIDTH):
        options = kernel.configuration(width)
        assert options["BLOCK_WIDTH"] >= width
        entries = options["BLOCK_ROWS"] * options["BLOCK_WIDTH"]
        assert entries // (32 * options["num_warps"]) in (8, 16)
