"""Shared attention in every type, at awkward sizes, through views and masks."""

from collections.abc import Callable

import pytest
import torch
from attention_cases import (
    FAST,
    assert_group_agrees,
    exact,
    gradients,
    group,
    inputs,
    normal,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse_kernels.shared_attention import follower_attention, leader_attention, streaming


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("backend", "queries", "keys"),
    [
        ("streaming", 63, 63),
        ("streaming", 1, 63),
        ("streaming", 1000, 1000),
        ("triton", 63, 63),
    ],
)
def test_accuracy(backend: str, dtype: torch.dtype, queries: int, keys: int) -> None:
    assert_group_agrees(backend, inputs((2, 1, 1, 2), queries, keys, dtype=dtype), causal=True)


@pytest.mark.parametrize("backend", FAST)
def test_one_query_and_one_key(backend: str) -> None:
    leaves = inputs((2, 1, 1, 1), 1, 1, dtype=exact(backend))
    outs = group(backend, *leaves, causal=True)
    torch.testing.assert_close(outs[1], leaves[3].expand(1, 2, 1, 16), rtol=0, atol=1e-6)
    # A is 1 whatever q and k are.
    assert all(grad.abs().max() < 1e-5 for grad in gradients(outs, leaves)[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accuracy_in_16_bits_where_nothing_is_kept(dtype: torch.dtype, nothing_kept: None) -> None:
    assert_group_agrees("streaming", inputs((2, 1, 1, 2), 150, 150, dtype=dtype), causal=True)


def test_rows_of_16_bit_probabilities_are_divided_by_their_own_sum() -> None:
    # 1/1021 rounds to 1/1024: undivided, the mean of ones would be 0.996.
    q, k, v = (t.detach().bfloat16() for t in inputs((1, 1, 1), 3, 1021))
    _, state = leader_attention(q * 0, k, v, backend="streaming")
    assert state.probabilities.dtype == torch.bfloat16
    torch.testing.assert_close(
        follower_attention(state, torch.ones_like(v)), torch.ones_like(q), rtol=0, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_follower_of_the_leaders_values_repeats_its_output(dtype: torch.dtype) -> None:
    q, k, v = inputs((4, 2, 2), 30, 200, dtype=dtype)
    out, state = leader_attention(q, k, v, backend="streaming")
    torch.testing.assert_close(follower_attention(state, v), out, rtol=0, atol=0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*[st.integers(1, 3)] * 3, st.integers(1, 40), st.integers(0, 40)),
    widths=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    causal=st.booleans(),
    masked=st.booleans(),
    stored=st.booleans(),
    rows=st.integers(1, 50),
    entries=st.integers(1, 5000),
)
def test_streaming_agrees_at_any_shape(
    shape: tuple[int, ...],
    widths: tuple[int, int],
    causal: bool,
    masked: bool,
    stored: bool,
    rows: int,
    entries: int,
) -> None:
    batch, kv_heads, ratio, queries, extra = shape
    heads, keys = kv_heads * ratio, queries + extra
    q = normal(batch, heads, queries, widths[0])
    k = normal(batch, kv_heads, keys, widths[0], seed=1)
    values = [
        normal(batch, g, keys, e, seed=2) for g, e in zip((kv_heads, heads), widths, strict=True)
    ]
    mask = normal(heads, 1, keys) > 0 if masked else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streaming, "CHUNK_ROWS", rows)
        patch.setattr(streaming, "CHUNK_ENTRIES", entries)
        patch.setattr(streaming, "STORED_BYTES_LIMIT", stored << 30)
        leaves = [t.requires_grad_() for t in (q, k, *values)]
        found = group("streaming", *leaves, causal=causal, mask=mask)
        found += gradients(found, leaves)
        wanted = group("reference", *leaves, causal=causal, mask=mask)
        wanted += gradients(wanted, leaves)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", FAST)
def test_values_of_other_head_counts(backend: str) -> None:
    leaves = inputs((4, 2, 2, 4, 1), 10, 23, dtype=exact(backend))
    assert_group_agrees(backend, leaves, mask=normal(10, 23) > -1)


def test_values_of_other_widths() -> None:
    q, k, v = inputs((2, 1, 1), 10, 23)
    wide = normal(1, 1, 23, 20, seed=7).requires_grad_()
    assert_group_agrees("streaming", [q, k, v, wide])


@pytest.mark.parametrize("backend", FAST)
def test_views_into_poisoned_storage(backend: str) -> None:
    """Tokens before heads, as projections give them, with NaN on every side."""
    plain = inputs((2, 1, 1, 1), 11, 11, dtype=exact(backend))

    def view(t: Tensor) -> Tensor:
        batch, heads, tokens, width = t.shape
        storage = t.new_full((batch + 2, tokens + 2, heads + 2, width + 3), torch.nan)
        inner = storage[1:-1, 1:-1, 1:-1, 1 : 1 + width].transpose(1, 2)
        inner.copy_(t.detach())
        return inner.detach().requires_grad_()

    views = [view(t) for t in plain]
    assert not views[0].is_contiguous()
    wanted, found = (group(backend, *leaves, causal=True) for leaves in (plain, views))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(gradients(found, views), gradients(wanted, plain), rtol=0, atol=1e-5)


@pytest.mark.parametrize("backend", FAST)
def test_expanded_inputs(backend: str) -> None:
    q, k, v = (normal(1, 1, 9, 16, seed=i, dtype=exact(backend)) for i in range(3))
    narrow = group(backend, q, k, v, v)
    wide = group(backend, *(t.expand(2, 3, 9, 16) for t in (q, k, v, v)))
    torch.testing.assert_close(wide, [t.expand(2, 3, 9, 16) for t in narrow], rtol=0, atol=1e-6)


MASKS: dict[str, Callable[[], Tensor]] = {
    "[keys]": lambda: normal(23) > 0,
    "[queries, keys]": lambda: normal(10, 23) > 0,
    "[queries, 1]": lambda: normal(10, 1) > 0,
    "[batch, 1, 1, keys]": lambda: normal(2, 1, 1, 23) > 0,
    "[heads, queries, keys]": lambda: normal(4, 10, 23) > 0,
    "transposed": lambda: (normal(23, 10) > 0).mT,
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [*(("streaming", name) for name in MASKS), ("triton", "[keys]"), ("triton", "transposed")],
)
def test_masks_of_every_shape(backend: str, name: str) -> None:
    leaves = inputs((4, 2, 2, 1), 10, 23, dtype=exact(backend), batch=2)
    assert_group_agrees(backend, leaves, mask=MASKS[name](), causal=name == "[keys]")


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_query_without_keys_gets_nothing(backend: str) -> None:
    leaves = inputs((2, 1, 1, 2), 9, 12, dtype=exact(backend))
    mask = torch.ones(9, 12, dtype=torch.bool)
    mask[4] = False
    out, state = leader_attention(*leaves[:3], mask=mask, backend=backend)
    outs = [out, follower_attention(state, leaves[3])]
    assert all((o[:, :, 4] == 0).all() for o in outs)
    assert (state.lse[:, :, 4] == -torch.inf).all()
    found = gradients(outs, leaves)
    assert (found[0][:, :, 4] == 0).all()
    assert all(grad.isfinite().all() for grad in found)
    assert found[0].abs().sum() > 0


@pytest.mark.parametrize(
    ("backend", "kept"),
    [("reference", True), ("streaming", True), ("streaming", False), ("triton", False)],
)
def test_keys_that_no_query_attends_to_may_hold_anything(
    backend: str, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", 0)
    clean = inputs((4, 2, 2, 1), 10, 10, dtype=exact(backend), batch=2)
    mask = torch.ones(2, 1, 1, 10, dtype=torch.bool)
    mask[0, ..., 7:] = mask[1, ..., :2] = False
    dirty = [clean[0]]
    for poison, t in zip((torch.nan, torch.inf, torch.nan), clean[1:], strict=True):
        hidden = ~mask[:, :, 0, :, None]
        dirty.append(t.detach().masked_fill(hidden, poison).requires_grad_())
    wanted, found = (group(backend, *t, mask=mask, causal=True) for t in (clean, dirty))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    torch.testing.assert_close(gradients(found, dirty), gradients(wanted, clean), rtol=0, atol=0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("backend", "kept"),
    [("reference", True), ("streaming", True), ("streaming", False), ("triton", False)],
)
def test_queries_that_see_no_key_may_hold_anything(
    backend: str, kept: bool, poison: float, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kept:
        monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", 0)
    clean = inputs((4, 2, 2, 1), 10, 12, dtype=exact(backend), batch=2)
    # Under the causal mask, padding on the left leaves the first query of the first text no key.
    mask = torch.ones(2, 1, 10, 12, dtype=torch.bool)
    mask[0, ..., :3] = mask[0, :, 4] = mask[1, :, 8] = False
    visible = mask.tril(2) if causal else mask
    dead = ~visible.any(-1)
    assert dead.sum() == 2 + causal
    dirty_q = clean[0].detach().masked_fill(dead[..., None], poison).requires_grad_()
    dirty = [dirty_q, *clean[1:]]
    wanted, found = (group(backend, *t, mask=mask, causal=causal) for t in (clean, dirty))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    grads = gradients(found, dirty)
    torch.testing.assert_close(grads, gradients(wanted, clean), rtol=0, atol=0)
    assert (grads[0].masked_select(dead[..., None]) == 0).all()


def test_left_padding_that_is_broadcast_leaves_queries_without_keys() -> None:
    q, k, v = inputs((2, 1, 1), 6, 6)
    padding = (torch.arange(6) > 2)[None, None, None]
    dirty = q.detach().clone()
    dirty[:, :, :3] = torch.nan
    _, state = leader_attention(dirty, k, v, mask=padding, causal=True, backend="streaming")
    assert (state.q[:, :, :3] == 0).all()
    assert (state.q[:, :, 3:] == q[:, :, 3:]).all()


def test_a_key_that_one_head_attends_to_is_not_hidden() -> None:
    leaves = inputs((4, 2, 2, 1), 10, 10)
    mask = torch.ones(1, 4, 1, 10, dtype=torch.bool)
    mask[:, 0, :, 3] = mask[:, 2, :, 4] = mask[:, 3, :, 4] = False
    _, state = leader_attention(*leaves[:3], mask=mask, backend="streaming")
    assert (state.k[:, 0, 3] == leaves[1][:, 0, 3]).all()
    assert (state.k[:, 1, 4] == 0).all()
