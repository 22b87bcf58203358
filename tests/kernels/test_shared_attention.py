"""Shared attention against its definition, and what it keeps."""

import pytest
import torch
from attention_cases import (
    FAST,
    TOLERANCES,
    assert_group_agrees,
    exact,
    gradients,
    group,
    inputs,
    normal,
    relative,
    weighted_sum,
)
from memory import peak_bytes
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from stillhouse_kernels.shared_attention import (
    follower_attention,
    leader_attention,
    operators,
    reference,
    streaming,
)


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", 0)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_a_leader_alone_is_ordinary_attention(backend: str, causal: bool) -> None:
    q, k, v = leaves = inputs((2, 2, 2), 37, 37, dtype=exact(backend))
    wanted = scaled_dot_product_attention(q, k, v, is_causal=causal)
    found = group(backend, q, k, v, causal=causal)
    for_values, for_gradients = TOLERANCES[q.dtype]
    assert relative(found[0], wanted) < for_values
    for a, b in zip(gradients(found, leaves), gradients([wanted], leaves), strict=True):
        assert relative(a, b) < for_gradients


@pytest.mark.parametrize("backend", FAST)
def test_probabilities_are_rebuilt_from_the_log_sum_exp(backend: str) -> None:
    q, k, v = inputs((2, 1, 1), 20, 33, dtype=exact(backend))
    _, state = leader_attention(q, k, v, causal=True, backend=backend)
    wanted, lse = reference.attention_probabilities(q, k, None, True, state.scale)
    scores = state.scale * q @ k.mT
    rebuilt = torch.exp(scores - state.lse[..., None]).tril(13)
    torch.testing.assert_close(state.lse, lse, rtol=0, atol=1e-6)
    torch.testing.assert_close(rebuilt, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(rebuilt.sum(-1), torch.ones_like(lse), rtol=0, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_kept_and_rebuilt_probabilities_agree(
    causal: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = inputs((4, 2, 2, 1), 150, 150)
    mask = normal(150, 150) > -1 if masked else None
    kept = group("streaming", *leaves, causal=causal, mask=mask)
    kept_gradients = gradients(kept, leaves)
    monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", 0)
    rebuilt = group("streaming", *leaves, causal=causal, mask=mask)
    pairs = zip([*kept, *kept_gradients], [*rebuilt, *gradients(rebuilt, leaves)], strict=True)
    assert all(relative(a, b) < 1e-12 for a, b in pairs)


def test_what_is_kept_is_counted_in_advance() -> None:
    for queries, keys, causal in [(1, 1, True), (96, 96, True), (300, 311, True), (40, 9, False)]:
        q, k, v = inputs((2, 1, 1), queries, keys)
        _, _, kept = streaming.leader_forward(q.detach(), k.detach(), v.detach(), None, causal, 1.0)
        assert kept.numel() == streaming.stored_entries(q, k, causal)
        if causal and queries == 300:
            assert kept.numel() == 2 * (96 * (107 + 203 + 299) + 12 * 311)


@pytest.mark.parametrize(
    ("backend", "layers"), [("streaming", 1), ("streaming", 2), ("streaming", 3), ("triton", 3)]
)
def test_one_pass_gives_the_gradients_of_a_materialised_group(backend: str, layers: int) -> None:
    assert_group_agrees(
        backend, inputs((4, 2, *[2] * layers), 21, 40, dtype=exact(backend)), causal=True
    )


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize("options", [{"causal": True}, {"detach_qk": True}, {"masked": True}])
def test_finite_differences(
    limit: int, options: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", limit)
    monkeypatch.setattr(streaming, "CHUNK_ROWS", 2)
    leaves = inputs((2, 1, 1, 2), 3, 4, width=2)
    masked = options.pop("masked", False) if (options := dict(options)) else False
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    chosen = {**options, "mask": mask if masked else None}
    if options.get("detach_qk"):
        values = leaves[2:]
        q, k = (leaf.detach() for leaf in leaves[:2])
        assert torch.autograd.gradcheck(lambda *v: group("streaming", q, k, *v, **chosen), values)
    else:
        assert torch.autograd.gradcheck(lambda *t: group("streaming", *t, **chosen), leaves)


def test_the_deltas_of_the_layers_add_up() -> None:
    q, k, *values = inputs((2, 1, 1, 1, 1), 30, 30)
    outs = group("streaming", q, k, *values, causal=True)
    grad_outs = [normal(*out.shape, seed=90 + i) for i, out in enumerate(outs)]
    A, _ = reference.attention_probabilities(q, k, None, True, 0.25)
    dP = sum(dO @ v.mT for dO, v in zip(grad_outs, values, strict=True))
    delta = sum((dO * out).sum(-1) for dO, out in zip(grad_outs, outs, strict=True))
    torch.testing.assert_close((A * dP).sum(-1), delta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", FAST)
def test_values_of_one_give_one_and_move_no_score(backend: str, dtype: torch.dtype) -> None:
    q, k, v = inputs((2, 1, 1), 19, 43, dtype=dtype)
    _, state = leader_attention(q * 0.1, k * 0.1, v, causal=True, backend=backend)
    out = follower_attention(state, torch.ones_like(v))
    # The kernel multiplies rounded entries that it normalises before; streaming divides after.
    rounding = 2**-8 if (backend, dtype) == ("triton", torch.bfloat16) else 1e-6
    torch.testing.assert_close(out, torch.ones_like(out), rtol=0, atol=rounding)
    grad_q, grad_k = gradients([out], [q, k])
    # dS = A (dO 1 - rowsum(dO)) cancels to the rounding of the output's type.
    bound = 1e-6 if dtype == torch.float32 else 1e-2
    assert grad_q.abs().max() < bound
    assert grad_k.abs().max() < bound


@pytest.mark.parametrize("backend", FAST)
def test_values_of_the_identity_give_the_probabilities(backend: str) -> None:
    q, k, v = inputs((2, 2, 2), 16, 16, dtype=exact(backend))
    _, state = leader_attention(q, k, v, causal=True, backend=backend)
    out = follower_attention(state, torch.eye(16, dtype=q.dtype).expand(1, 2, 16, 16))
    wanted, _ = reference.attention_probabilities(q, k, None, True, 0.25)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", FAST)
def test_blocks_of_keys_add_up_in_any_split(backend: str) -> None:
    q, k, v = (t.detach() for t in inputs((2, 1, 1), 9, 40, dtype=exact(backend)))
    _, state = leader_attention(q, k, v, backend=backend)
    whole = follower_attention(state, v)
    nothing = q.new_empty(0)
    mask = torch.ones(1, 1, 9, 40, dtype=torch.bool)

    def part(a: int, b: int) -> Tensor:
        piece = mask[..., a:b]
        arguments = (state.lse, nothing, piece, False, state.scale, backend)
        return operators.follower_forward(q, k[:, :, a:b], v[:, :, a:b], *arguments)

    torch.testing.assert_close(part(0, 17) + part(17, 40), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(part(33, 40) + part(0, 33), whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("limit", [0, 1 << 30])
@pytest.mark.parametrize(("rows", "entries"), [(1, 1), (7, 4 * 7 * 70 * 2), (64, 1), (1000, 10**6)])
def test_the_size_of_a_chunk_changes_nothing(
    rows: int, entries: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "CHUNK_ROWS", rows)
    monkeypatch.setattr(streaming, "CHUNK_ENTRIES", entries)
    monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", limit)
    mask = normal(3, 1, 65, 70) > -1
    leaves = inputs((4, 2, 2, 1), 65, 70, batch=3)
    assert_group_agrees("streaming", leaves, causal=True, mask=mask)


@pytest.mark.parametrize("backend", FAST)
def test_uniform_scores_give_the_running_mean(backend: str) -> None:
    q, k, v = inputs((2, 1, 1), 50, 50, dtype=exact(backend))
    _, state = leader_attention(q.detach() * 0, k, v, causal=True, backend=backend)
    count = torch.arange(1, 51)[:, None]
    mean = v.cumsum(2) / count
    torch.testing.assert_close(
        follower_attention(state, v), mean.expand(1, 2, 50, 16), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("backend", "tokens"), [("reference", 1), ("streaming", 1), ("streaming", 3), ("triton", 3)]
)
def test_decoding_equals_the_batched_pass(backend: str, tokens: int) -> None:
    q, k, *values = (t.detach() for t in inputs((4, 2, 2, 1), 12, 12, dtype=exact(backend)))
    batched = group(backend, q, k, *values, causal=True)
    for start in range(0, 12, tokens):
        stop = start + tokens
        cached = [t[:, :, :stop] for t in (k, *values)]
        step = group(backend, q[:, :, start:stop], *cached, causal=True)
        for found, wanted in zip(step, batched, strict=True):
            torch.testing.assert_close(found, wanted[:, :, start:stop], rtol=0, atol=1e-6)


def test_no_square_is_held_where_followers_recompute(nothing_kept: None) -> None:
    def peak(tokens: int) -> int:
        def run() -> None:
            leaves = inputs((1, 1, 1, 1), tokens, tokens, width=8, dtype=torch.float32)
            weighted_sum(group("streaming", *leaves, causal=True)).backward()

        return peak_bytes(run)

    sizes = [peak(n) for n in (512, 1024, 2048)]
    # A term c N^2 would leave 2 c 512^2 here: 2 MB for one square of float32.
    assert abs((sizes[2] - sizes[1]) - 2 * (sizes[1] - sizes[0])) < 2**16


def test_half_of_the_square_is_held_where_it_is_kept() -> None:
    q, k, v = (t.detach() for t in inputs((1, 1, 1), 1024, 1024, width=8, dtype=torch.float32))
    square = 1024 * 1024 * 4
    held = leader_attention(q, k, v, causal=True, backend="streaming")[1].probabilities.nbytes
    assert held == pytest.approx(0.5 * square, rel=0.13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_counts_bytes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs((2, 1, 1), 10, 30, dtype=dtype)
    size = 2 * 10 * 30 * dtype.itemsize
    for limit, kept in [(size, size), (size - 1, 0)]:
        monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", limit)
        assert leader_attention(q, k, v)[1].probabilities.nbytes == kept


def test_a_large_batch_is_worked_off_in_parts(
    nothing_kept: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v = (t.detach() for t in inputs((1, 1, 1), 64, 512, batch=16, dtype=torch.float32))

    def run() -> None:
        leader_attention(q, k, v, backend="streaming")

    whole = peak_bytes(run)
    monkeypatch.setattr(streaming, "CHUNK_ENTRIES", 2 * 64 * 512)
    # Two buffers of scores, for 2 elements of the batch in place of 16.
    assert whole - peak_bytes(run) >= 2 * 14 * 64 * 512 * 4


class Stack(torch.nn.Module):
    """Six layers of causal attention on a residual stream, in groups of three."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qk = torch.nn.ModuleList(torch.nn.Linear(8, 16, bias=False) for _ in range(2))
        self.v = torch.nn.ModuleList(torch.nn.Linear(8, 8, bias=False) for _ in range(6))
        self.double()

    def forward(self, x: Tensor, *, share: bool, stream: bool) -> list[Tensor]:
        outs = []
        state = None
        for layer, to_v in enumerate(self.v):
            q, k = (t[:, None] for t in self.qk[layer // 3](x).chunk(2, dim=-1))
            v = to_v(x)[:, None]
            if share and layer % 3:
                assert state is not None
                out = follower_attention(state, v)
            else:
                out, state = leader_attention(q, k, v, causal=True)
            outs.append(out[:, 0])
            x = x + out[:, 0] if stream else x
        return outs


def test_layers_of_equal_scores_share_them_and_others_do_not() -> None:
    model = Stack()
    x = normal(2, 10, 8)
    shared, own = (model(x, share=share, stream=False) for share in (True, False))
    torch.testing.assert_close(shared, own)
    shared, own = (model(x, share=share, stream=True) for share in (True, False))
    torch.testing.assert_close(shared[0], own[0])
    assert all(relative(a, b) > 1e-3 for a, b in zip(shared[1:3], own[1:3], strict=True))
