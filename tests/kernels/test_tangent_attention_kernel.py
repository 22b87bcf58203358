"""The Triton kernel of attention and its tangent, in the interpreter, against float64."""

from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from stillhouse_kernels.tangent_attention import kernel, launch

# torch's own, when it first loads what forward-mode AD needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

VALUES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
TANGENTS = VALUES | {torch.float32: 5e-6}
GRADIENTS = VALUES | {torch.float32: 2e-5}
SCALE = 0.3
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
    drawn = [scattered(batch, *s, dtype=dtype, seed=i) for i, s in enumerate(shapes + shapes)]
    return Dual(*drawn)


class Results(NamedTuple):
    out: Tensor
    out_t: Tensor
    lse: Tensor


def materialised(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """softmax(scale Q Kᵀ) V and lse; a row that sees no key gives 0."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = scale * q @ k.mT
    visible = torch.ones(s.shape, dtype=torch.bool, device=DEVICE)
    visible = visible.tril(s.shape[-1] - s.shape[-2]) if causal else visible
    visible = visible if mask is None else visible & mask
    s = s.masked_fill(~visible, -torch.inf)
    blind = ~visible.any(-1, keepdim=True)
    p = s.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return p @ v, s.detach().logsumexp(-1)


def truth(of: Dual, mask: Tensor | None, causal: bool, scale: float) -> Results:
    """In float64, by forward-mode AD through a materialised P."""
    primals = tuple(x.double() for x in of[:3])
    tangents = tuple(
        torch.zeros_like(x) if t is None else t.double()
        for x, t in zip(primals, of[3:], strict=True)
    )

    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return materialised(q, k, v, mask, causal, scale)

    return Results(*torch.func.jvp(forward, primals, tangents, has_aux=True))


def assert_close(ours: Tensor, true: Tensor, bound: float, dtype: torch.dtype) -> None:
    assert (ours.shape, ours.dtype) == (true.shape, dtype)
    assert (ours.double() - true).norm() <= bound * true.norm()


def check(
    of: Dual, mask: Tensor | None = None, causal: bool = False, scale: float = SCALE
) -> Results:
    ours = Results(*launch.jvp(*of, mask, causal, scale))
    true, dtype = truth(of, mask, causal, scale), of.q.dtype
    assert torch.equal(ours.lse == -torch.inf, true.lse == -torch.inf)
    seen = true.lse != -torch.inf
    assert_close(ours.lse[seen], true.lse[seen], 2e-6, torch.float32)
    assert_close(ours.out, true.out, VALUES[dtype], dtype)
    assert_close(ours.out_t, true.out_t, TANGENTS[dtype], dtype)
    assert not ours.out[~seen].any()
    assert not ours.out_t[~seen].any()
    return ours


@pytest.mark.parametrize("dtype", list(VALUES), ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_dual_equals_float64_in_every_dtype(dtype: torch.dtype, causal: bool) -> None:
    """Grouped queries, tails in every axis, every tensor with strides of its own."""
    check(dual(2, 1, 63, 100, 32, dtype=dtype), causal=causal)


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "value_dim"),
    [(1, 1, 1, 1), (1, 100, 64, 64), (63, 63, 65, 65), (5, 40, 16, 100), (5, 40, 128, 20)],
)
def test_awkward_sizes(queries: int, keys: int, head_dim: int, value_dim: int) -> None:
    check(dual(1, 1, queries, keys, head_dim, value_dim, batch=2), causal=True)


def test_heads_of_keys_and_values_are_shared() -> None:
    check(dual(6, 2, 5, 7, 8, batch=2))
    of = dual(4, 2, 5, 7, 16, batch=2)
    v, v_t = (scattered(2, 4, 7, 16, dtype=torch.float32, seed=i) for i in (2, 5))
    check(of._replace(v=v, v_t=v_t))


@pytest.mark.parametrize("present", list(product((False, True), repeat=3)), ids=str)
def test_tangents_that_are_none(present: tuple[bool, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """They count as zeros; where all but q_t, or all but v_t, are None the products go too."""
    run, patterns = launch._run, []
    monkeypatch.setattr(launch, "_run", lambda p, *rest: (patterns.append(p), run(p, *rest)))
    of = dual(2, 1, 20, 40, 16, 24)
    tangents = [t if has else None for t, has in zip(of[3:], present, strict=True)]
    results = check(Dual(*of[:3], *tangents), causal=True)
    assert results.out_t.any() == any(present)
    single = [name for name, has in kernel.PATTERNS.items() if has == present]
    assert patterns == (single or ["all"])


def test_tangents_that_are_none_take_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(launch, "_run", lambda _, arguments, *rest: given.update(arguments))
    of = dual(2, 1, 20, 40, 16)
    launch.jvp(*of[:3], None, of.k_t, None, None, False, SCALE)
    for name in ("q_t_ptr", "v_t_ptr"):
        assert given[name].untyped_storage().nbytes() == 16 * 4


def random_mask(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6).to(DEVICE)


@pytest.mark.parametrize(
    ("breadth", "pattern"),
    [((2, 2), "all"), ((1, 2), "all"), ((2, 1), "query"), ((1, 1), "value")],
)
def test_masks_of_every_breadth_with_rows_that_see_nothing(
    breadth: tuple[int, int], pattern: str
) -> None:
    mask = random_mask(*breadth, 35, 40)
    mask[..., 3, :] = False
    # The last rows see nothing in the first key block, the first rows nothing elsewhere.
    mask[..., 30:, :32] = False
    mask[..., :4, 32:] = False
    of = dual(2, 1, 35, 40, 16, batch=2)
    tangents = [t if p else None for t, p in zip(of[3:], kernel.PATTERNS[pattern], strict=True)]
    results = check(Dual(*of[:3], *tangents), mask, causal=True)
    assert (results.lse[..., 3] == -torch.inf).all()


def test_mask_in_any_layout() -> None:
    of = dual(2, 2, 20, 33, 8)
    check(of, random_mask(1, 1, 33, 20).mT)
    check(of, (torch.arange(33, device=DEVICE) < 30).expand(1, 1, 20, 33))


LAYOUTS = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[:, :, :1].expand(x.shape),
    "rows of 19": lambda x: F.pad(x, (0, 3))[..., :-3],
    "odd address": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tangents_of_any_layout_are_taken(layout: str) -> None:
    of = dual(2, 1, 20, 33, 16)
    relaid = Dual(*[LAYOUTS[layout](x) for x in of])
    check(Dual(*of[:3], *relaid[3:]))
    check(Dual(*relaid[:3], *of[3:]))


def test_a_tangent_hidden_from_a_query_does_not_reach_it() -> None:
    """Not even where it is NaN, and not by a rounding: the results are the same bits."""
    of = dual(1, 1, 40, 40, 16)
    out, out_t, _ = launch.jvp(*of, None, True, SCALE)
    assert of.k_t is not None
    k_t = of.k_t.clone()
    k_t[:, :, 20:] = torch.nan
    poisoned = launch.jvp(*of._replace(k_t=k_t), None, True, SCALE)
    assert torch.equal(poisoned[0], out)
    assert torch.equal(poisoned[1][:, :, :20], out_t[:, :, :20])
    assert poisoned[1][:, :, 20:].isnan().all()
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool, device=DEVICE)
    mask[..., :30, 20:] = False
    poisoned = launch.jvp(*of._replace(k_t=k_t), mask, False, SCALE)
    assert not poisoned[1][:, :, :30].isnan().any()


@pytest.mark.parametrize("masked", [False, True])
def test_what_all_keys_and_all_values_share_costs_no_digits(masked: bool) -> None:
    """Without c, and with r of what is not rounded, the error is 7e-3."""
    of = dual(1, 1, 64, 128, 64, dtype=torch.float16)
    shared = [x / 2 + 4 * (name in ("k", "v", "k_t")) for name, x in of._asdict().items()]
    mask = None
    if masked:  # the first key block is hidden from half of the rows
        mask = torch.ones(1, 1, 64, 128, dtype=torch.bool, device=DEVICE)
        mask[..., 32:, :32] = False
    of = Dual(*shared)
    _, out_t, _ = launch.jvp(*of, mask, False, 1 / 8)
    assert_close(out_t, truth(of, mask, False, 1 / 8).out_t, 4e-4, torch.float16)


def test_large_scores_do_not_overflow() -> None:
    of = dual(1, 1, 20, 40, 16)
    of = of._replace(q=60 * of.q)
    out, out_t, lse = launch.jvp(*of, None, False, SCALE)
    true = truth(of, None, False, SCALE)
    assert lse.max() > 100
    # float32 scores of some hundreds carry errors of some 1e-5.
    assert_close(out, true.out, 1e-4, torch.float32)
    assert_close(out_t, true.out_t, 1e-4, torch.float32)


def test_scores_that_do_not_matter() -> None:
    """Scale 0 gives the mean of the values and of their tangents."""
    of = dual(1, 1, 20, 40, 16)
    out, out_t, _ = launch.jvp(*of, None, False, 0.0)
    assert of.v_t is not None
    assert_close(out, of.v.double().mean(2, keepdim=True).expand(out.shape), 1e-6, torch.float32)
    mean = of.v_t.double().mean(2, keepdim=True)
    assert_close(out_t, mean.expand(out.shape), 1e-6, torch.float32)


def test_result_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    of = dual(2, 1, 40, 50, 16)
    ours = launch.jvp(*of, None, True, SCALE)
    monkeypatch.setattr(kernel, "INTERPRETER_TILE", (16, 64, 4, 1))
    for a, b in zip(ours, launch.jvp(*of, None, True, SCALE), strict=True):
        assert_close(a, b.double(), 1e-6, torch.float32)


@pytest.mark.parametrize("value_dim", [16, 8, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_primal_and_its_gradients(value_dim: int, masked: bool) -> None:
    of = dual(4, 2, 20, 40, 16, value_dim)
    mask = random_mask(1, 4, 20, 40) if masked else None
    if mask is not None:
        mask[..., 3, :] = False
    out, lse = launch.forward(*of[:3], mask, True, SCALE)
    q, k, v = primals = [x.double().requires_grad_() for x in of[:3]]
    true, true_lse = materialised(q, k, v, mask, True, SCALE)
    assert_close(out, true, VALUES[torch.float32], torch.float32)
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=2e-6)
    grad_out = scattered(1, 4, 20, value_dim, dtype=torch.float32, seed=9)
    grads = launch.backward(*of[:3], out, lse, grad_out, mask, True, SCALE)
    expected_grads = torch.autograd.grad(true, primals, grad_out.double())
    for grad, expected in zip(grads, expected_grads, strict=True):
        assert grad.is_contiguous()
        assert_close(grad, expected, GRADIENTS[torch.float32], torch.float32)


def test_forward_and_backward_are_adjoint() -> None:
    """<dO, Ȯ> = <dQ, Q̇> + <dK, K̇> + <dV, V̇>, with the lse of the kernel itself."""
    of = dual(4, 2, 20, 40, 16, 24)
    out, out_t, lse = launch.jvp(*of, None, True, SCALE)
    grad_out = scattered(1, 4, 20, 24, dtype=torch.float32, seed=9)
    grads = launch.backward(*of[:3], out, lse, grad_out, None, True, SCALE)
    pairs = [(g, t) for g, t in zip(grads, of[3:], strict=True) if t is not None]
    backward = sum((g.double() * t.double()).sum().item() for g, t in pairs)
    assert (grad_out.double() * out_t.double()).sum().item() == pytest.approx(backward, rel=1e-5)


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


@pytest.mark.parametrize(
    ("capability", "chip"), [(86, 80), (89, 80), (90, 90), (103, 100), (110, 100), (120, 80)]
)
def test_unknown_chips_take_the_entry_of_one_with_no_more_memory(
    capability: int, chip: int
) -> None:
    for compilation in kernel.compilations(chip):
        pattern, _, _ = compilation.label.partition(",")
        bits, width = 16 if compilation.matrix_product else 32, compilation.constexprs["HEAD_DIM"]
        options = kernel.configuration(pattern, capability, width, bits)
        assert options["BLOCK_M"] == compilation.constexprs["BLOCK_M"]
        assert options["num_warps"] == compilation.num_warps


def test_what_is_launched_is_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments and their types; what the compiler takes for multiples of 16 are."""
    monkeypatch.setattr(launch, "_run", lambda _, arguments, *rest: given.append(arguments))
    given: list[dict[str, Any]] = []
    for of in (dual(2, 1, 3, 5, 20), dual(2, 1, 3, 5, 64, 40, batch=2)):
        mask = random_mask(of.q.shape[0], 1, 3, 5)
        launch.jvp(*of, None, True, SCALE)
        launch.jvp(*of[:4], None, None, mask, True, SCALE)
        launch.jvp(*of[:3], None, *of[4:], None, False, 1)
    for layout in LAYOUTS.values():
        of = Dual(*[layout(x) for x in dual(2, 1, 3, 5, 16)])
        launch.jvp(*of, None, True, SCALE)
    compiled = next(kernel.compilations(90))
    names = {*compiled.signature, *compiled.constexprs}
    assert len(given) == 6 + len(LAYOUTS)
    for arguments in given:
        assert arguments.keys() | kernel.configuration("all", 90, 64, 32).keys() == names | OPTIONS
        numbers = [arguments[name] for name in compiled.divisible]
        pointers = [x.data_ptr() for name, x in arguments.items() if name.endswith("_ptr")]
        assert not [x for x in numbers + pointers if x % 16]
        for argument, triton_type in compiled.signature.items():
            assert isinstance(arguments[argument], PYTHON_TYPE.get(triton_type, Tensor)), argument
