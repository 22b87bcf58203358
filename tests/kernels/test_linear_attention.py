"""ReLU linear attention and its tangent, on the CPU, against torch's own jvp of the formula."""

from collections.abc import Callable
from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as fwd
from attention_cases import normal, relative
from linear_cases import (
    BACKENDS,
    SHAPES,
    Six,
    draw,
    leaves_and_tangents,
    plain,
    true_gradients,
    truth,
)
from memory import peak_bytes
from tangent_cases import TOLERANCES
from torch import Tensor

from stillhouse_kernels.linear_attention import (
    relu_linear_attention,
    relu_linear_attention_jvp,
    streaming,
)

# torch's own, when it first loads what forward-mode AD needs.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


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
