"""The Triton kernels of ReLU linear attention, in the interpreter, against float64."""

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from stillhouse_kernels.linear_attention import (
    kernel,
    launch,
    relu_linear_attention,
    relu_linear_attention_jvp,
)

# torch's own, when it first loads what forward-mode AD needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

VALUES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TANGENTS = VALUES | {torch.float32: 5e-6}
GRADIENTS = VALUES | {torch.float32: 2e-5}
EPS = 1e-15
PYTHON_TYPE = {"i32": int, "fp32": float}
OPTIONS = {"num_warps", "num_stages"}
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
    """Random [B, h, N, d] as a transposed view into a larger storage full of NaN.

    Strides and address are multiples of 16: where d is too, the kernel reads it in place.
    """
    batch, heads, tokens, width = shape
    # Another storage for every seed, hence other strides.
    around = (batch, tokens + 2, heads + 1 + seed, 16 * (2 + width // 16))
    storage = torch.full(around, torch.nan, dtype=dtype, device=DEVICE)
    view = storage[:, 1:-1, 1 + seed :, 16 : 16 + width].transpose(1, 2)
    generator = torch.Generator().manual_seed(seed)
    return view.copy_(torch.randn(shape, generator=generator))


class Dual(NamedTuple):
    """Inputs and their tangents."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_t: Tensor | None
    k_t: Tensor | None
    v_t: Tensor | None


def dual(
    heads: int,
    kv_heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> Dual:
    shapes = ((heads, queries, head_dim), (kv_heads, keys, head_dim))
    shapes += ((kv_heads, keys, head_dim if value_dim is None else value_dim),)
    drawn = (scattered(batch, *s, dtype=dtype, seed=i) for i, s in enumerate(shapes + shapes))
    return Dual(*drawn)


def plain(q: Tensor, k: Tensor, v: Tensor, eps: float = EPS) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    weights = q.relu() @ k.relu().mT
    return (weights @ v) / (weights.sum(-1, keepdim=True) + eps)


class Results(NamedTuple):
    out: Tensor
    out_t: Tensor
    sums: Tensor


def truth(of: Dual, eps: float = EPS) -> Results:
    """In float64, by forward-mode AD through the formula."""
    primals = tuple(x.double().contiguous() for x in of[:3])
    tangents = tuple(
        torch.zeros_like(x) if t is None else t.double().contiguous()
        for x, t in zip(primals, of[3:], strict=True)
    )
    _, k, v = primals
    sums = F.pad(v, (0, 1), value=1.0).mT @ k.relu()
    return Results(*torch.func.jvp(lambda *x: plain(*x, eps), primals, tangents), sums)


def assert_close(ours: Tensor, true: Tensor, bound: float, dtype: torch.dtype) -> None:
    assert (ours.shape, ours.dtype) == (true.shape, dtype)
    assert ours.is_contiguous()
    assert (ours.double() - true).norm() <= bound * true.norm()


def check(of: Dual, eps: float = EPS) -> Results:
    ours, true, dtype = Results(*launch.jvp(*of, eps)), truth(of, eps), of.q.dtype
    assert_close(ours.out, true.out, VALUES[dtype], dtype)
    assert_close(ours.out_t, true.out_t, TANGENTS[dtype], dtype)
    assert_close(ours.sums, true.sums, 2e-6, torch.float32)
    return ours


def check_gradients(of: Dual, eps: float = EPS) -> tuple[Tensor, ...]:
    dtype = of.q.dtype
    out, sums = launch.forward(*of[:3], eps)
    primals = [x.double().requires_grad_() for x in of[:3]]
    true = plain(*primals, eps)
    assert_close(out, true, VALUES[dtype], dtype)
    grad_out = scattered(*out.shape, dtype=dtype, seed=9)
    grads = launch.backward(*of[:3], sums, grad_out, eps)
    expected_grads = torch.autograd.grad(true, primals, grad_out.double())
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, GRADIENTS[dtype], dtype)
    return grads


@pytest.mark.parametrize("dtype", list(VALUES), ids=str)
def test_equals_float64_in_every_dtype(dtype: torch.dtype) -> None:
    """Grouped queries, tails in every axis, every tensor with strides of its own."""
    of = dual(2, 1, 41, 70, 20, 40, dtype)
    check(of)
    check_gradients(of)


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "value_dim"),
    [(1, 40, 16, 16), (40, 7, 40, 16), (5, 40, 128, 20), (20, 5, 16, 100)],
)
def test_awkward_sizes(queries: int, keys: int, head_dim: int, value_dim: int) -> None:
    of = dual(1, 1, queries, keys, head_dim, value_dim, batch=2)
    check(of)
    check_gradients(of)


def test_one_key_gives_its_value() -> None:
    of = dual(1, 1, 20, 1, 16)
    q, k = of.q.abs(), of.k.abs()
    out, out_t, _ = launch.jvp(*of._replace(q=q, k=k), EPS)
    assert of.v_t is not None
    assert_close(out, of.v.double().expand(out.shape), 1e-6, torch.float32)
    assert_close(out_t, of.v_t.double().expand(out.shape), 5e-6, torch.float32)


def test_heads_of_keys_and_values_are_shared() -> None:
    of = dual(6, 2, 5, 7, 8, batch=2)
    check(of)
    check_gradients(of)


@pytest.mark.parametrize("present", list(product((False, True), repeat=3))[1:], ids=str)
def test_tangents_that_are_none(present: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """They count as zeros; the products of keys and values go where both have none."""
    run, launched = launch._run, []

    def recorded(plan: Any, arguments: dict[str, Any]) -> None:
        launched.append({name: v for name, v in arguments.items() if name.startswith("HAS")})
        run(plan, arguments)

    monkeypatch.setattr(launch, "_run", recorded)
    of = dual(2, 1, 20, 40, 16, 24)
    tangents = [t if has else None for t, has in zip(of[3:], present, strict=True)]
    check(Dual(*of[:3], *tangents))
    varied = any(present[1:])
    assert launched == [
        {"HAS_TANGENT": varied},
        {"HAS_QUERY_TANGENT": True, "HAS_KEY_TANGENT": varied},
    ]


def test_tangents_that_are_none_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(launch, "_run", lambda _, arguments: given.update(arguments))
    of = dual(2, 1, 20, 40, 16)
    launch.jvp(*of[:3], None, of.k_t, None, EPS)
    for name in ("q_t_ptr", "v_t_ptr"):
        assert given[name].untyped_storage().nbytes() == 16 * 4


@pytest.mark.parametrize("dtype", list(VALUES), ids=str)
def test_a_query_that_meets_no_key(dtype: torch.dtype) -> None:
    """Its row, tangent and gradients are 0; the features that it has, no key has."""
    of = dual(1, 1, 20, 40, 16, dtype=dtype)
    of.k[..., 0] = -of.k[..., 0].abs()
    for row in (3, 19):
        of.q[:, :, row] = -of.q[:, :, row].abs()
    of.q[:, :, 19, 0] = 2
    results, (grad_q, *_) = check(of), check_gradients(of)
    for t in (results.out, results.out_t, grad_q):
        assert not t[:, :, [3, 19]].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_not_a_number_is_not_taken_for_zero() -> None:
    of = dual(2, 1, 5, 7, 16, batch=2)
    of.q[0, 0, 3, 0] = of.k[1, 0, 5, 0] = torch.nan
    for t in launch.jvp(*of, EPS)[:2]:
        assert t[0, 0, 3].isnan().all()
        assert t[1].isnan().all()
        assert not t[0, 1].isnan().any()


def test_eps_counts() -> None:
    of = dual(1, 1, 20, 40, 16)
    check(of, 3.0)
    check_gradients(of, 3.0)


@pytest.mark.parametrize("dtype", list(VALUES), ids=str)
def test_what_all_values_share_costs_no_digits(dtype: torch.dtype) -> None:
    """Sums rounded to 16 bits without the centre would leave no digit of the tangent."""
    of = dual(1, 1, 40, 64, 32, dtype=dtype)
    of = of._replace(v=of.v / 4 + 16)
    _, out_t, _ = launch.jvp(*of, EPS)
    bound = 5e-5 if dtype == torch.float32 else TANGENTS[dtype]
    assert_close(out_t, truth(of).out_t, bound, dtype)
    grad_out = of.q.new_ones(1, 1, 40, 32) * of.q
    _, sums = launch.forward(*of[:3], EPS)
    grad_q, grad_k, _ = launch.backward(*of[:3], sums, grad_out, EPS)
    primals = [x.double().requires_grad_() for x in of[:3]]
    true = torch.autograd.grad(plain(*primals), primals, grad_out.double())
    bound = 1e-4 if dtype == torch.float32 else 2 * GRADIENTS[dtype]
    assert_close(grad_q, true[0], bound, dtype)
    assert_close(grad_k, true[1], bound, dtype)


def test_float16_holds_sums_of_any_size() -> None:
    """Sᵀ beyond 65504, and gradients below its smallest normal number."""
    of = dual(1, 1, 20, 64, 16, dtype=torch.float16)
    of = of._replace(k=of.k * 100, v=of.v * 200)
    results = check(of)
    assert results.sums.max() > 65504
    of = of._replace(v=of.v / 200)
    _, sums = launch.forward(*of[:3], EPS)
    grad_out = scattered(1, 1, 20, 16, dtype=torch.float16, seed=9)
    large = launch.backward(*of[:3], sums, grad_out, EPS)
    small = launch.backward(*of[:3], sums, grad_out / 1024, EPS)
    assert_close(1024 * small[2], large[2].double(), 2e-3, torch.float16)


def test_sums_repeat_bit_for_bit_and_do_not_depend_on_the_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of = dual(2, 1, 50, 70, 16, 40)
    grad_out = scattered(1, 2, 50, 40, dtype=torch.float32, seed=9)

    def computed() -> list[Tensor]:
        out, out_t, sums = launch.jvp(*of, EPS)
        return [out, out_t, sums, *launch.backward(*of[:3], sums, grad_out, EPS)]

    ours = computed()
    assert all(torch.equal(a, b) for a, b in zip(ours, computed(), strict=True))
    monkeypatch.setattr(kernel, "INTERPRETER_TILE", (64, 32, 4, 1))
    monkeypatch.setattr(kernel, "PROGRAMS", 2)
    for a, b in zip(ours, computed(), strict=True):
        assert_close(a, b.double(), 2e-6, torch.float32)


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "rows of 19": lambda x: F.pad(x, (0, 3))[..., :-3],
    "odd address": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_taken(layout: str) -> None:
    of = dual(2, 1, 20, 33, 16)
    relaid = Dual(*[LAYOUTS[layout](x) for x in of])
    check(Dual(*of[:3], *relaid[3:]))
    check(Dual(*relaid[:3], *of[3:]))


@pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning")
@pytest.mark.parametrize("compiled", [False, True])
def test_public_function_under_jvp(compiled: bool) -> None:
    torch._dynamo.reset()
    of = dual(2, 1, 17, 20, 12, 20)
    leaves = tuple(x.contiguous().requires_grad_() for x in of[:3])
    tangents = tuple(x.contiguous() for x in of[3:] if x is not None)

    def derive(*six: Tensor) -> tuple[Tensor, Tensor]:
        out, out_t = torch.func.jvp(
            lambda *x: relu_linear_attention(*x, backend="triton"), six[:3], six[3:]
        )
        return out, out_t.detach()

    run = torch.compile(derive, backend="aot_eager", fullgraph=True) if compiled else derive
    out, out_t = run(*leaves, *tangents)
    true = truth(of)
    assert out_t.norm() > 0
    assert_close(out, true.out, VALUES[torch.float32], torch.float32)
    assert_close(out_t, true.out_t, TANGENTS[torch.float32], torch.float32)
    primals = [x.detach().double().requires_grad_() for x in leaves]
    expected_grads = torch.autograd.grad(plain(*primals), primals, true.out_t)
    grads = torch.autograd.grad(out, leaves, true.out_t.float())
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected, GRADIENTS[torch.float32], torch.float32)
    by_hand = relu_linear_attention_jvp(*leaves, *tangents, backend="triton")
    assert torch.equal(by_hand[1], out_t)


def refused(
    head_dim: int = 64, value_dim: int = 64, dtype: torch.dtype = torch.float32
) -> str | None:
    q, v = torch.zeros(1, 1, 2, head_dim, dtype=dtype), torch.zeros(1, 1, 2, value_dim)
    return launch.refusal(q, q, v.to(dtype))


def test_refusal_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused() is None
    assert refused(128, 48, torch.bfloat16) is None
    assert refused(160, 160) == "the head dim is 160, the kernel takes at most 128"
    assert refused(64, 129) == "the value dim is 129, the kernel takes at most 128"
    assert refused(dtype=torch.float64) == (
        "the dtype of q is float64, the kernel takes float32, float16, bfloat16"
    )
    monkeypatch.setattr(launch, "compute_capability", lambda _: 75)
    assert refused() == "cpu has compute capability 7.5, the kernel needs 8.0"


def test_chunks_are_whole_blocks_and_fewer_with_many_heads() -> None:
    given = ((1000, 1), (1000, 10_000), (64, 1), (1, 1))
    assert [kernel.chunk_rows(rows, slots, 32, 64, 90) for rows, slots in given] == [
        256, 1024, 64, 64,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "chip"), [(86, 80), (89, 80), (90, 90), (103, 100), (110, 100), (120, 80)]
)
def test_unknown_chips_take_the_entry_of_one_with_no_more_memory(
    capability: int, chip: int
) -> None:
    for compilation in kernel.compilations(chip):
        bits, width = 16 if compilation.matrix_product else 32, compilation.constexprs["HEAD_DIM"]
        name = compilation.kernel.__name__
        options = kernel.configuration(name, capability, width, bits)
        assert options["BLOCK"] == compilation.constexprs["BLOCK"]
        assert options["num_warps"] == compilation.num_warps


def test_what_is_launched_is_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments and their types; what the compiler takes for multiples of 16 are."""
    given: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(launch, "_run", lambda plan, arguments: given.append((plan, arguments)))
    cases = [dual(2, 1, 3, 5, 20), dual(2, 1, 3, 5, 64, 40, batch=2)]
    cases += [Dual(*[layout(x) for x in dual(2, 1, 3, 5, 16)]) for layout in LAYOUTS.values()]
    for of in cases:
        _, sums = launch.forward(*of[:3], EPS)
        launch.jvp(*of, EPS)
        launch.jvp(*of[:4], None, None, EPS)
        launch.backward(*of[:3], sums, torch.zeros(*of.q.shape[:3], of.v.shape[3]), EPS)
    compiled = {(c.kernel, *patterns(c.constexprs)): c for c in kernel.compilations(90)}
    assert len(given) == 8 * len(cases)
    for plan, arguments in given:
        compilation = compiled[plan.function, *patterns(arguments)]
        names = {*compilation.signature, *compilation.constexprs}
        assert arguments.keys() | plan.options.keys() == names | OPTIONS
        numbers = [arguments[name] for name in compilation.divisible]
        pointers = [x.data_ptr() for name, x in arguments.items() if name.endswith("_ptr")]
        assert not [x for x in numbers + pointers if x % 16]
        for argument, triton_type in compilation.signature.items():
            assert isinstance(arguments[argument], PYTHON_TYPE.get(triton_type, Tensor)), argument


def patterns(arguments: dict[str, Any]) -> tuple[bool, ...]:
    return tuple(v for name, v in sorted(arguments.items()) if name.startswith("HAS"))
