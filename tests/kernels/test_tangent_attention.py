"""Attention and its tangent against torch's own jvp in float64, and what holds of both exactly."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from attention_cases import normal, relative
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from tangent_cases import TOLERANCES, explicit, tensors, true_gradients, truth
from torch import Tensor

from stillhouse_kernels import attention, attention_jvp
from stillhouse_kernels.tangent_attention import streaming

BACKENDS = ["reference", "streaming"]

SHAPES: dict[str, dict[str, Any]] = {
    "square": {"queries": 63},
    "longer than a chunk": {"queries": 300},
    "more keys": {"queries": 5, "keys": 33},
    "grouped": {"heads": 4, "kv_heads": 2, "queries": 13, "batch": 2},
    "one group": {"heads": 4, "kv_heads": 1, "queries": 13},
    "wide values": {"queries": 9, "width": 8, "value_width": 12},
    "one query": {"queries": 1, "keys": 7},
}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_and_tangents(backend: str, shape: str, causal: bool, dtype: torch.dtype) -> None:
    six = tensors(**SHAPES[shape], dtype=dtype)
    out, out_t, lse = attention_jvp(*six, causal=causal, backend=backend)
    wanted, wanted_t = truth(six, causal=causal)
    for_values, for_tangents, _ = TOLERANCES[dtype]
    assert out.dtype == out_t.dtype == dtype
    assert relative(out, wanted) < for_values
    assert relative(out_t, wanted_t) < for_tangents
    q, k, *_ = (t.double() for t in six)
    S = q.shape[3] ** -0.5 * q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT
    if causal:
        S = S.masked_fill(~torch.ones_like(S, dtype=torch.bool).tril(S.shape[3] - S.shape[2]), -1e9)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert relative(lse, S.logsumexp(-1)) < max(for_values, 2e-6)


@pytest.mark.parametrize("rows", [1, 7, 16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_any_size_of_chunk(
    rows: int, causal: bool, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming._Inputs, "chunk_rows", property(lambda self: rows))
    monkeypatch.setattr(streaming, "CHUNK_ENTRIES", (40, 60))
    six = tensors(4, groups, queries=19, keys=23, value_width=5, batch=3)
    mask = normal(3, 4, 19, 23) > -0.7
    out, out_t, _ = attention_jvp(*six, mask=mask, causal=causal, backend="streaming")
    wanted, wanted_t = truth(six, mask=mask, causal=causal)
    assert relative(out, wanted) < 1e-13
    assert relative(out_t, wanted_t) < 1e-13


@pytest.mark.parametrize("given_tangents", range(8))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tangent_of_none_is_zero(backend: str, given_tangents: int) -> None:
    six = tensors(4, 2, queries=13)
    chosen = [t if given_tangents >> i & 1 else None for i, t in enumerate(six[3:])]
    zeros = [t if t is not None else torch.zeros_like(s) for t, s in zip(chosen, six, strict=False)]
    out, out_t, _ = attention_jvp(*six[:3], *chosen, causal=True, backend=backend)
    wanted, wanted_t = truth([*six[:3], *zeros], causal=True)
    torch.testing.assert_close(out, wanted, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(out_t, wanted_t, rtol=1e-13, atol=1e-13)
    assert given_tangents or not out_t.any()


@pytest.mark.parametrize("scale", [0.0, 0.3, -0.3, 50.0])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_scale(backend: str, scale: float) -> None:
    """At 50 scores go beyond what an exponential can hold; at 0 the average is plain."""
    six = tensors(queries=40)
    out, out_t, lse = attention_jvp(*six, scale=scale, backend=backend)
    wanted, wanted_t = truth(six, scale=scale)
    assert relative(out, wanted) < 1e-12
    assert relative(out_t, wanted_t) < 1e-11
    assert lse.isfinite().all()
    if scale == 0:
        torch.testing.assert_close(out, six[2].mean(2, keepdim=True).expand_as(out))
        torch.testing.assert_close(out_t, six[5].mean(2, keepdim=True).expand_as(out))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_weight_of_one_takes_its_key_s_tangent(backend: str) -> None:
    q, k, v, *_, v_t = tensors(queries=6)
    out, out_t, _ = attention_jvp(q, k, v, None, None, v_t, scale=1e4, backend=backend)
    best = (q @ k.mT).argmax(-1, keepdim=True).expand_as(out)
    torch.testing.assert_close(out, v.gather(2, best))
    torch.testing.assert_close(out_t, v_t.gather(2, best))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_tangent_is_linear(backend: str) -> None:
    six, others = tensors(queries=30), tensors(queries=30, size=0.7)[::-1]
    a, b = six[3:], [others[i] for i in (2, 1, 0)]

    def tangent(*tangents: Tensor) -> Tensor:
        return attention_jvp(*six[:3], *tangents, causal=True, backend=backend)[1]

    mixed = tangent(*(2 * x - 3 * y for x, y in zip(a, b, strict=True)))
    torch.testing.assert_close(mixed, 2 * tangent(*a) - 3 * tangent(*b))
    assert not tangent(*(torch.zeros_like(x) for x in a)).any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_are_adjoint(backend: str, groups: int, causal: bool) -> None:
    """<dO, Ȯ> = <dQ, Q̇> + <dK, K̇> + <dV, V̇>: ties the tangent to the gradients."""
    six = tensors(4, groups, queries=21, keys=26, value_width=6)
    leaves = [t.requires_grad_() for t in six[:3]]
    out, out_t, _ = attention_jvp(*leaves, *six[3:], causal=causal, backend=backend)
    grad_out = normal(*out.shape, seed=9)
    grads = torch.autograd.grad(out, leaves, grad_out)
    adjoint = sum((g * t).sum() for g, t in zip(grads, six[3:], strict=True))
    torch.testing.assert_close((grad_out * out_t.detach()).sum(), adjoint.detach())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_of_the_primal(shape: str, causal: bool, dtype: torch.dtype) -> None:
    six = tensors(**SHAPES[shape], dtype=dtype)
    leaves = [t.requires_grad_() for t in six[:3]]
    for out in (
        attention(*leaves, causal=causal, backend="streaming"),
        attention_jvp(*leaves, *six[3:], causal=causal, backend="streaming")[0],
    ):
        grad_out = normal(*out.shape, dtype=dtype, seed=9)
        wanted = true_gradients(leaves, grad_out, causal=causal)
        for found, true in zip(torch.autograd.grad(out, leaves, grad_out), wanted, strict=True):
            assert found.dtype == dtype
            assert (found.double() - true).norm() <= TOLERANCES[dtype][2] * true.norm() + 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_forms(backend: str) -> None:
    q, k, v, q_t, k_t, v_t = tensors(queries=12)

    def tangent(*six: Tensor | None, **options: Any) -> Tensor:
        return attention_jvp(*six, backend=backend, **options)[1]

    # Values alone: the average of their tangents.
    torch.testing.assert_close(tangent(q, k, v, None, None, v_t), explicit(q, k, v_t))
    # Equal values: nothing to move between.
    equal = v[:, :, :1].expand_as(v)
    assert tangent(q, k, equal, q_t, k_t).abs().max() < 1e-14
    # A tangent that is the same for every key moves a row of scores by a constant.
    torch.testing.assert_close(
        tangent(q, k, v, None, k_t[:, :, :1].expand_as(k), v_t), explicit(q, k, v_t)
    )
    # One key.
    one = [t[:, :, :1] for t in (k, v, k_t, v_t)]
    out, out_t, _ = attention_jvp(q, one[0], one[1], q_t, one[2], one[3], backend=backend)
    torch.testing.assert_close(out, one[1].expand_as(out))
    torch.testing.assert_close(out_t, one[3].expand_as(out))
    # The first query of a causal call sees the first key.
    out, out_t, _ = attention_jvp(q, k, v, q_t, k_t, v_t, causal=True, backend=backend)
    torch.testing.assert_close(out[:, :, 0], v[:, :, 0])
    torch.testing.assert_close(out_t[:, :, 0], v_t[:, :, 0])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_vector_added_to_all_keys_changes_nothing(backend: str, causal: bool) -> None:
    q, k, v, q_t, k_t, v_t = tensors(queries=12)
    moved, moved_t = k + normal(8, seed=11), k_t + normal(8, seed=12)
    wanted = attention_jvp(q, k, v, q_t, k_t, v_t, causal=causal, backend=backend)[:2]
    found = attention_jvp(q, moved, v, q_t, moved_t, v_t, causal=causal, backend=backend)
    torch.testing.assert_close(found[0], wanted[0])
    # q_t meets the moved keys too: the same for every key.
    torch.testing.assert_close(found[1], wanted[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_keys_does_not_matter(backend: str) -> None:
    q, k, v, q_t, k_t, v_t = tensors(queries=12, keys=30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    mixed = (t[:, :, order] for t in (k, v, k_t, v_t))
    k2, v2, k2_t, v2_t = mixed
    torch.testing.assert_close(
        attention_jvp(q, k2, v2, q_t, k2_t, v2_t, backend=backend),
        attention_jvp(q, k, v, q_t, k_t, v_t, backend=backend),
    )


@pytest.mark.parametrize("cuts", [(0, 1, 30), (0, 13, 30), (0, 5, 6, 20, 30)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_the_keys_merge_into_the_whole(backend: str, cuts: tuple[int, ...]) -> None:
    q, k, v, q_t, k_t, v_t = tensors(queries=12, keys=30)
    scale = 8**-0.5
    parts = []
    for first, last in pairwise(cuts):
        own = [t[:, :, first:last] for t in (k, v, k_t, v_t)]
        out, out_t, lse = attention_jvp(q, *own[:2], q_t, *own[2:], backend=backend)
        _, mu = torch.func.jvp(
            lambda q, k: (scale * q @ k.mT).logsumexp(-1), (q, own[0]), (q_t, own[2])
        )
        parts.append((out, out_t, lse, mu))
    outs, outs_t, L, mu = (torch.stack(column) for column in zip(*parts, strict=True))
    w = (L - L.logsumexp(0)).exp()
    mean = (w * mu).sum(0)
    merged = (w[..., None] * outs).sum(0)
    merged_t = (w[..., None] * (outs_t + (mu - mean)[..., None] * outs)).sum(0)
    out, out_t, lse = attention_jvp(q, k, v, q_t, k_t, v_t, backend=backend)
    torch.testing.assert_close(merged, out)
    torch.testing.assert_close(merged_t, out_t)
    torch.testing.assert_close(L.logsumexp(0), lse)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_is_bit_for_bit_independent_of_later_keys(backend: str, dtype: torch.dtype) -> None:
    six = tensors(queries=140, dtype=dtype)
    changed = [t.clone() for t in six]
    for i in (1, 2, 4, 5):
        changed[i][:, :, 100:] = 3 * changed[i][:, :, 100:] + 1
    whole = attention_jvp(*six, causal=True, backend=backend)
    other = attention_jvp(*changed, causal=True, backend=backend)
    for a, b in zip(whole, other, strict=True):
        assert torch.equal(a[:, :, :100], b[:, :, :100])
        assert not torch.equal(a[:, :, 100:], b[:, :, 100:])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_mask_hides_may_hold_anything(
    backend: str, dtype: torch.dtype, causal: bool
) -> None:
    """A row without keys is 0 and sends no gradient; hidden keys and dead queries may be NaN."""
    six = tensors(4, 2, queries=9, keys=12, batch=2, dtype=dtype)
    mask = torch.ones(2, 1, 9, 12, dtype=torch.bool)
    mask[0, :, 2] = False
    mask[1, :, :, 3] = mask[1, :, :, 10:] = False
    wanted, wanted_t = truth(six, mask=mask, causal=causal)
    for i, t in enumerate(six):
        if i % 3 == 0:
            t[0, :, 2] = torch.nan
        else:
            t[1, :, 3] = t[1, :, 10:] = torch.nan
    leaves = [t.requires_grad_() for t in six[:3]]
    out, out_t, lse = attention_jvp(*leaves, *six[3:], mask=mask, causal=causal, backend=backend)
    plain = attention(*leaves, mask=mask, causal=causal, backend=backend)
    assert relative(out, wanted) < TOLERANCES[dtype][0]
    assert relative(plain, wanted) < TOLERANCES[dtype][0]
    assert relative(out_t, wanted_t) < TOLERANCES[dtype][1]
    assert not out[0, :, 2].any()
    assert not out_t[0, :, 2].any()
    assert (lse[0, :, 2] == -torch.inf).all()
    for grads in (
        torch.autograd.grad(out.sum(), leaves),
        torch.autograd.grad(plain.sum(), leaves),
    ):
        assert all(g.isfinite().all() for g in grads)
        assert not grads[0][0, :, 2].any()
        assert not grads[1][1, :, 10:].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_central_difference(backend: str) -> None:
    six = tensors(4, 2, queries=15)
    h = 1e-5
    ends = [
        explicit(*(p + sign * h * t for p, t in zip(six[:3], six[3:], strict=True)), causal=True)
        for sign in (1, -1)
    ]
    out_t = attention_jvp(*six, causal=True, backend=backend)[1]
    assert relative(out_t, (ends[0] - ends[1]) / (2 * h)) < 1e-8


@pytest.mark.parametrize(
    ("dtype", "offset", "budget"),
    [
        (torch.bfloat16, 0.0, 1.7e-3),
        (torch.float16, 0.0, 2e-4),
        (torch.bfloat16, 4.0, 1.8e-3),
        (torch.float32, 4.0, 1e-6),
    ],
)
def test_error_budget(dtype: torch.dtype, offset: float, budget: float) -> None:
    """The card's; an offset that all keys share costs no digits. Results are rounded to dtype."""
    six = tensors(2, queries=256, width=64, size=0.5, dtype=dtype, offset=offset)
    out_t = attention_jvp(*six, backend="streaming")[1]
    assert relative(out_t, truth(six)[1].to(dtype)) < 3 * budget


@pytest.mark.parametrize("backend", BACKENDS)
def test_tangents_of_another_layout(backend: str) -> None:
    six = tensors(4, 2, queries=13, batch=2)
    wanted = attention_jvp(*six, causal=True, backend=backend)
    for layout in (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.mT.contiguous().mT,
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        moved = [*six[:3], *(layout(t) for t in six[3:])]
        torch.testing.assert_close(attention_jvp(*moved, causal=True, backend=backend), wanted)
        moved = [*(layout(t) for t in six[:3]), *six[3:]]
        torch.testing.assert_close(attention_jvp(*moved, causal=True, backend=backend), wanted)
    expanded = [*six[:3], *(t[:1].expand_as(t) for t in six[3:])]
    torch.testing.assert_close(
        attention_jvp(*expanded, backend=backend),
        attention_jvp(*(t.contiguous() for t in expanded), backend=backend),
    )


def test_memory_grows_with_the_length_and_not_with_its_square() -> None:
    def peak(tokens: int, run: Callable[..., Any]) -> int:
        six = tensors(queries=tokens, width=16, dtype=torch.float32)
        run(*six)
        return peak_bytes(lambda: run(*six))

    def ours(*six: Tensor) -> Any:
        return attention_jvp(*six, backend="streaming")

    short, long = peak(2048, ours), peak(4096, ours)
    assert long < 2.2 * short
    assert long < 2 * 4096 * 4096 * 4 / 8
    explicitly = peak(2048, lambda *six: torch.func.jvp(explicit, tuple(six[:3]), tuple(six[3:])))
    assert explicitly > 8 * short


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (3, 3)]),
    queries=st.integers(1, 40),
    more_keys=st.integers(0, 20),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    causal=st.booleans(),
    masked=st.booleans(),
    offset=st.sampled_from([0.0, 30.0]),
)
def test_any_inputs(
    heads: tuple[int, int], queries: int, more_keys: int, widths: tuple[int, int], causal: bool,
    masked: bool, offset: float,
) -> None:  # fmt: skip
    keys = queries + more_keys
    six = tensors(*heads, queries, keys, *widths, batch=2, offset=offset)
    mask = (normal(2, 1, queries, keys, seed=7) > -0.3) if masked else None
    out, out_t, _ = attention_jvp(*six, mask=mask, causal=causal, backend="streaming")
    wanted, wanted_t = truth(six, mask=mask, causal=causal)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(out_t, wanted_t, rtol=1e-9, atol=1e-9)
