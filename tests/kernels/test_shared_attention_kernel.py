"""The Triton kernels of shared attention, in the interpreter, against a few lines in float64."""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from stillhouse_kernels import launching
from stillhouse_kernels.shared_attention import kernel, launch

VALUES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
GRADIENTS = VALUES | {torch.float32: 2e-5}
SCALE = 0.3
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
    """Random [B, h, N, d] as a transposed view into a larger storage full of NaN.

    Strides and address are multiples of 16: where d is too, the kernels read it in place.
    """
    batch, heads, tokens, width = shape
    around = (batch, tokens + 2, heads + 1, 16 * (2 + width // 16))
    storage = torch.full(around, torch.nan, dtype=dtype, device=DEVICE)
    view = storage[:, 1:-1, 1:, 16 : 16 + width].transpose(1, 2)
    generator = torch.Generator().manual_seed(seed)
    return view.copy_(torch.randn(shape, generator=generator))


class Group(NamedTuple):
    """A leader and its followers, with the gradients that reach their outputs."""

    q: Tensor
    k: Tensor
    values: list[Tensor]
    grad_outs: list[Tensor]


def group(
    heads: int,
    kv_heads: int,
    value_heads: tuple[int, ...],
    queries: int,
    keys: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
) -> Group:
    def draw(seed: int, heads: int, tokens: int) -> Tensor:
        return scattered(batch, heads, tokens, head_dim, dtype=dtype, seed=seed)

    return Group(
        draw(0, heads, queries),
        draw(1, kv_heads, keys),
        [draw(10 + i, h, keys) for i, h in enumerate(value_heads)],
        [draw(20 + i, heads, queries) for i in range(len(value_heads))],
    )


class Results(NamedTuple):
    outs: list[Tensor]
    lse: Tensor
    grad_values: list[Tensor]
    grad_q: Tensor
    grad_k: Tensor


def truth(of: Group, mask: Tensor | None, causal: bool) -> Results:
    """In float64, by autograd through a materialised A; a row that sees no key has A = 0."""
    q, k, *values = (x.double().requires_grad_() for x in (of.q, of.k, *of.values))
    heads = q.shape[1]
    s = SCALE * q @ k.repeat_interleave(heads // k.shape[1], 1).mT
    visible = torch.ones(s.shape, dtype=torch.bool, device=DEVICE)
    visible = visible.tril(s.shape[-1] - s.shape[-2]) if causal else visible
    s = s.masked_fill(~(visible if mask is None else visible & mask), -torch.inf)
    e = (s - s.detach().amax(-1, keepdim=True).clamp_min(-1e30)).exp()
    a = e / e.sum(-1, keepdim=True).clamp_min(1e-300)
    outs = [a @ v.repeat_interleave(heads // v.shape[1], 1) for v in values]
    grad_outs = [g.double() for g in of.grad_outs]
    grad_q, grad_k, *grad_values = torch.autograd.grad(outs, [q, k, *values], grad_outs)
    return Results(outs, s.logsumexp(-1), grad_values, grad_q, grad_k)


def launched(of: Group, mask: Tensor | None, causal: bool) -> Results:
    q, k, (first, *followers) = of.q, of.k, of.values
    rest = (mask, causal, SCALE)
    out, lse, kept = launch.leader_forward(q, k, first, *rest)
    assert kept.shape == (0,)
    outs = [out, *(launch.follower_forward(q, k, v, lse, kept, *rest) for v in followers)]
    grad_values = [
        launch.value_backward(q, k, lse, kept, grad_out, *rest, v.shape[1])
        for v, grad_out in zip(of.values, of.grad_outs, strict=True)
    ]
    products = [o.float() * g.float() for o, g in zip(outs, of.grad_outs, strict=True)]
    delta = torch.stack(products).sum((0, -1))
    grad_q, grad_k = launch.score_backward(q, k, lse, kept, of.values, of.grad_outs, delta, *rest)
    return Results(outs, lse, grad_values, grad_q, grad_k)


def assert_close(ours: Tensor, true: Tensor, bound: float, dtype: torch.dtype) -> None:
    assert (ours.shape, ours.dtype) == (true.shape, dtype)
    assert (ours.double() - true).norm() <= bound * true.norm()


def check(of: Group, mask: Tensor | None = None, causal: bool = False) -> Results:
    ours, true, dtype = launched(of, mask, causal), truth(of, mask, causal), of.q.dtype
    assert torch.equal(ours.lse == -torch.inf, true.lse == -torch.inf)
    seen = true.lse != -torch.inf
    assert_close(ours.lse[seen], true.lse[seen], 2e-6, torch.float32)
    for out, expected in zip(ours.outs, true.outs, strict=True):
        assert_close(out, expected, VALUES[dtype], dtype)
        assert not out[~seen].any()
    for grad_v, expected in zip(ours.grad_values, true.grad_values, strict=True):
        assert_close(grad_v, expected, GRADIENTS[dtype], dtype)
    assert_close(ours.grad_q, true.grad_q, GRADIENTS[dtype], dtype)
    assert_close(ours.grad_k, true.grad_k, GRADIENTS[dtype], dtype)
    return ours


@pytest.mark.parametrize("dtype", list(VALUES), ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_group_equals_float64_in_every_dtype(dtype: torch.dtype, causal: bool) -> None:
    """Grouped queries, and tails in every axis."""
    check(group(2, 1, (1, 1), 40, 63, 32, dtype), causal=causal)


def test_every_layer_has_its_own_groups() -> None:
    """Value heads finer and coarser than the key heads, three layers at once."""
    check(group(4, 2, (2, 4, 1), 5, 7, 16, batch=2), causal=True)
    check(group(6, 2, (2, 3), 5, 7, 8))


@pytest.mark.parametrize(
    ("queries", "keys", "head_dim"), [(1, 1, 1), (1, 100, 64), (63, 63, 65), (5, 100, 128)]
)
def test_awkward_sizes(queries: int, keys: int, head_dim: int) -> None:
    check(group(1, 1, (1, 1), queries, keys, head_dim, batch=2), causal=True)


def random_mask(*shape: int) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.6).to(DEVICE)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("keys", [999, 1008])
def test_an_expanded_mask_is_not_filled_in(
    keys: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launching, "has_wide_mask", lambda *_: wide)
    q, mask = torch.zeros(2, 4, 1000, 16, device=DEVICE), random_mask(2, 1, 1, keys)
    given = launching.mask_arguments(q, mask.expand(2, 4, 1000, keys))
    found = given["mask_ptr"]
    held = found.untyped_storage().nbytes()
    assert held <= 2 * 1008 * (4 if wide else 1)
    assert found.shape == (2, 4, 1000, 1008)
    assert given["mask_row_stride"] == given["mask_head_stride"] == 0
    assert (found[..., :keys].bool() == mask).all()
    assert not found[..., keys:].any()


@pytest.mark.parametrize("breadth", [(2, 2), (1, 2), (2, 1), (1, 1)])
def test_masks_of_every_breadth_with_rows_that_see_nothing(breadth: tuple[int, int]) -> None:
    mask = random_mask(*breadth, 35, 40)
    mask[..., 3, :] = False
    # The last rows see nothing in the first key block, the first rows nothing elsewhere.
    mask[..., 30:, :32] = False
    mask[..., :4, 32:] = False
    results = check(group(2, 1, (1,), 35, 40, 16, batch=2), mask, causal=True)
    assert (results.lse[..., 3] == -torch.inf).all()
    assert not results.grad_q[..., 3, :].any()


def test_mask_in_any_layout() -> None:
    of = group(2, 2, (2,), 20, 33, 8)
    check(of, random_mask(1, 1, 33, 20).mT)
    check(of, (torch.arange(33, device=DEVICE) < 30).expand(1, 1, 20, 33))


LAYOUTS = {
    "columns apart": lambda x: F.pad(x[..., None], (0, 15))[..., 0],
    "rows of 19": lambda x: F.pad(x, (0, 3))[..., :-3],
    "odd address": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
}


def relaid(of: Group, layout: str) -> Group:
    relay = LAYOUTS[layout]
    values, grad_outs = ([relay(x) for x in xs] for xs in (of.values, of.grad_outs))
    return Group(relay(of.q), relay(of.k), values, grad_outs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_taken(layout: str) -> None:
    check(relaid(group(2, 2, (2, 2), 20, 33, 16), layout))


def test_what_is_launched_is_what_is_compiled_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The arguments that the compiler is told to be multiples of 16 are, for any head dim."""
    monkeypatch.setattr(launch, "_run", lambda function, arguments, *_: given.append(arguments))
    given: list[dict[str, Any]] = []
    launched(group(2, 1, (1, 2), 3, 5, 20), None, True)
    launched(group(2, 1, (1, 2), 3, 5, 20, batch=2), random_mask(2, 1, 3, 5), True)
    for layout in LAYOUTS:
        launched(relaid(group(2, 1, (1, 2), 3, 5, 16), layout), None, True)
    told = {name for c in kernel.compilations(90) for name in c.divisible}
    numbers = [a[name] for a in given for name in told & a.keys()]
    pointers = [a[name].data_ptr() for a in given for name in a if name.endswith("_ptr")]
    assert len(given) == 6 * 5
    assert not [x for x in numbers + pointers if x % 16]


def test_large_scores_do_not_overflow() -> None:
    of = group(1, 1, (1,), 20, 40, 16)
    q = 60 * of.q
    out, lse, _ = launch.leader_forward(q, of.k, of.values[0], None, False, SCALE)
    true = truth(of._replace(q=q), None, False)
    assert lse.max() > 100
    # float32 scores of some hundreds carry errors of some 1e-5.
    assert_close(out, true.outs[0], 1e-4, torch.float32)


def test_followers_of_ones_and_of_the_identity() -> None:
    """Values of ones give 1, and no gradient of the scores; the identity gives A."""
    of = group(2, 1, (1,), 30, 48, 48)
    ones, identity = torch.ones_like(of.k), torch.eye(48, device=DEVICE).expand(1, 1, 48, 48)
    rest = (None, True, SCALE)
    _, lse, kept = launch.leader_forward(of.q, of.k, ones, *rest)
    out = launch.follower_forward(of.q, of.k, ones, lse, kept, *rest)
    assert_close(out, torch.ones_like(out).double(), 2e-6, torch.float32)
    delta = of.grad_outs[0].sum(-1)
    grads = launch.score_backward(of.q, of.k, lse, kept, [ones], of.grad_outs, delta, *rest)
    assert max(grad.abs().max() for grad in grads) < 1e-5
    a = launch.follower_forward(of.q, of.k, identity, lse, kept, *rest)
    assert not a.triu(48 - 30 + 1).any()
    assert_close(a.sum(-1), torch.ones_like(a[..., 0]).double(), 2e-6, torch.float32)


def test_result_does_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    of = group(2, 1, (1,), 40, 50, 16)
    ours = launched(of, None, True)
    monkeypatch.setattr(kernel, "INTERPRETER_TILE", (16, 64, 4, 1))
    regrouped = launched(of, None, True)
    for a, b in (
        (ours.outs[0], regrouped.outs[0]),
        (ours.lse, regrouped.lse),
        (ours.grad_values[0], regrouped.grad_values[0]),
        (ours.grad_q, regrouped.grad_q),
        (ours.grad_k, regrouped.grad_k),
    ):
        assert_close(a, b.double(), 1e-6, torch.float32)


def refused(
    head_dim: int = 64, value_dim: int = 64, dtype: torch.dtype = torch.float32
) -> str | None:
    q, v = torch.zeros(1, 1, 2, head_dim, dtype=dtype), torch.zeros(1, 1, 2, value_dim)
    return launch.refusal(q, q, v.to(dtype))


def test_refusal_names_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused() is None
    assert refused(128, 128, torch.bfloat16) is None
    assert refused(160, 160) == "the head dim is 160, the kernel takes at most 128"
    assert refused(64, 48) == "the value dim is 48 and the head dim 64, the kernel takes equal ones"
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
        name, bits = compilation.kernel.__name__, 16 if compilation.matrix_product else 32
        width = compilation.constexprs["HEAD_DIM"]
        options = kernel.configuration(name, capability, width, bits)
        assert options["BLOCK_M"] == compilation.constexprs["BLOCK_M"]
        assert options["num_warps"] == compilation.num_warps


def test_compilations_have_the_arguments_of_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled ahead of time is what is launched, but for the interpreter's upcast."""
    given: dict[str, dict[str, Any]] = {}

    def record(function: Any, arguments: dict[str, Any], *_: Any) -> None:
        given[function.__name__] = arguments

    monkeypatch.setattr(launch, "_run", record)
    launched(group(2, 1, (1, 2), 3, 4, 64), None, True)
    compiled = {c.kernel.__name__: c for c in kernel.compilations(80)}
    assert given.keys() == compiled.keys()
    for name, arguments in given.items():
        constexprs = {"HEAD_DIM", "BLOCK_M", "BLOCK_N"}
        signature = compiled[name].signature
        needed = signature.keys() | compiled[name].constexprs.keys()
        assert needed <= arguments.keys() | constexprs
        for argument, triton_type in signature.items():
            assert isinstance(arguments[argument], PYTHON_TYPE.get(triton_type, Tensor)), argument
