"""Shared attention under torch.compile, checkpointing, autocast and DDP."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_kernels import Layers, train_rank
from torch import Tensor
from torch.library import opcheck
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from stillhouse_kernels.shared_attention import (
    follower_attention,
    leader_attention,
    operators,
    streaming,
)

Group = Callable[..., tuple[Tensor, ...]]


def normal(*sizes: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(dtype)


def inputs(tokens: int = 12, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """q of 4 heads, k and the leader's v of 2, two followers' v of 2 and 1."""
    return [
        normal(2, heads, tokens, 16, dtype=dtype, seed=i).requires_grad_()
        for i, heads in enumerate((4, 2, 2, 2, 1))
    ]


def grouped(backend: str = "streaming", **options: Any) -> Group:
    def group(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        out, state = leader_attention(q, k, v, causal=True, backend=backend, **options)
        return out, *(follower_attention(state, value) for value in values)

    return group


def values_and_gradients(group: Group, leaves: list[Tensor]) -> list[Tensor]:
    outs = group(*leaves)
    weights = [normal(*out.shape, dtype=out.dtype, seed=90 + i) for i, out in enumerate(outs)]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, leaves, weights)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask": normal(12, 12) > -1},
    "detached": {"detach_qk": True},
}


@pytest.mark.parametrize(
    ("backend", "options"), [("reference", "plain"), *(("streaming", name) for name in OPTIONS)]
)
def test_a_compiled_group_is_one_graph(backend: str, options: str) -> None:
    torch._dynamo.reset()
    group, leaves = grouped(backend, **OPTIONS[options]), inputs()
    compiled = torch.compile(group, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        values_and_gradients(compiled, leaves), values_and_gradients(group, leaves)
    )


def test_the_kernel_in_a_compiled_group() -> None:
    torch._dynamo.reset()
    leaves = [t.detach()[:1].requires_grad_() for t in inputs(12, torch.float32)[:4]]
    compiled = torch.compile(grouped("triton"), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        values_and_gradients(compiled, leaves),
        values_and_gradients(grouped("reference"), leaves),
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.parametrize("detached", [False, True])
def test_a_compiled_follower_computes_only_what_is_asked(
    detached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    layers: list[int] = []
    original = streaming.score_backward

    def counted(*arguments: Any) -> Any:
        layers.append(len(arguments[4]))
        return original(*arguments)

    monkeypatch.setattr(streaming, "score_backward", counted)
    compiled = torch.compile(grouped(detach_qk=detached), backend="aot_eager", fullgraph=True)
    values_and_gradients(compiled, inputs())
    assert layers == ([1] if detached else [1, 1, 1])


def test_compiled_for_any_length() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(grouped(), backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (140, 300, 12):
        leaves = inputs(tokens)
        torch.testing.assert_close(
            values_and_gradients(compiled, leaves), values_and_gradients(grouped(), leaves)
        )


@pytest.mark.parametrize("compiled_part", ["leader", "followers"])
def test_a_state_crosses_the_border_of_a_graph(compiled_part: str) -> None:
    torch._dynamo.reset()

    def lead(*qkv: Tensor) -> Any:
        return leader_attention(*qkv, causal=True, backend="streaming")

    def follow(state: Any, *values: Tensor) -> tuple[Tensor, ...]:
        return tuple(follower_attention(state, value) for value in values)

    if compiled_part == "leader":
        lead = torch.compile(lead, backend="aot_eager", fullgraph=True)
    else:
        follow = torch.compile(follow, backend="aot_eager", fullgraph=True)

    def group(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        out, state = lead(q, k, v)
        return out, *follow(state, *values)

    leaves = inputs()
    torch.testing.assert_close(
        values_and_gradients(group, leaves), values_and_gradients(grouped(), leaves)
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_by_inductor(dtype: torch.dtype) -> None:
    from torch._inductor.utils import fresh_cache

    torch._dynamo.reset()
    leaves = inputs(150, dtype)
    compiled = torch.compile(grouped(), fullgraph=True)
    # The cache on disk knows the operators by name: it may hold sizes of another version of them.
    with fresh_cache():
        got = values_and_gradients(compiled, leaves)
    bound = 2e-6 if dtype == torch.float32 else 1e-2
    pairs = zip(got, values_and_gradients(grouped(), leaves), strict=True)
    assert all((a - b).norm() <= bound * b.norm() for a, b in pairs)


@pytest.mark.parametrize(("kept", "masked"), [(True, True), (False, False)])
def test_operators_keep_torchs_rules(
    kept: bool, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streaming, "STORED_BYTES_LIMIT", kept << 30)
    monkeypatch.setattr(streaming, "CHUNK_ROWS", 4)
    q, k, v, _, other = inputs()
    mask = (normal(1, 4, 12, 12) > -1) if masked else None
    settings = (True, 0.25, "streaming")
    opcheck(operators.leader_forward, (q, k, v, mask, *settings))
    out, lse, kept_A = (t.detach() for t in operators.leader_forward(q, k, v, mask, *settings))
    assert kept_A.numel() == kept * 2 * 4 * 4 * (4 + 8 + 12)
    opcheck(operators.follower_forward, (q, k, other, lse, kept_A, mask, *settings))
    saved = (q.detach(), k.detach(), lse, kept_A)
    causal, scale, backend = settings
    opcheck(operators.value_backward, (*saved, out, mask, causal, scale, 1, backend))
    pairs = ([v.detach(), other.detach()], [out, out], (out * out).sum(-1))
    opcheck(operators.score_backward, (*saved, *pairs, mask, *settings))


def test_the_kernel_returns_what_its_operator_declares() -> None:
    q, k, v = (t.detach()[:1] for t in inputs(12, torch.bfloat16)[:3])
    settings = (True, 0.25, "triton")
    checks = ("test_schema", "test_faketensor")
    opcheck(operators.leader_forward, (q, k, v, None, *settings), test_utils=checks)
    out, lse, kept = operators.leader_forward(q, k, v, None, *settings)
    saved = (q, k, lse, kept)
    opcheck(operators.follower_forward, (q, k, v, lse, kept, None, *settings), test_utils=checks)
    opcheck(
        operators.value_backward, (*saved, out, None, True, 0.25, 2, "triton"), test_utils=checks
    )
    pairs = ([v, v], [out, out], lse)
    opcheck(operators.score_backward, (*saved, *pairs, None, *settings), test_utils=checks)


def test_a_checkpointed_group() -> None:
    leaves = inputs()

    def group(*tensors: Tensor) -> Any:
        return checkpoint(grouped(), *tensors, use_reentrant=False)

    torch.testing.assert_close(
        values_and_gradients(group, leaves), values_and_gradients(grouped(), leaves)
    )


def test_followers_in_checkpoints_of_their_own() -> None:
    leaves = inputs()

    def group(q: Tensor, k: Tensor, v: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        out, state = leader_attention(q, k, v, causal=True, backend="streaming")
        run: Any = checkpoint
        return out, *(run(follower_attention, state, x, use_reentrant=False) for x in values)

    torch.testing.assert_close(
        values_and_gradients(group, leaves), values_and_gradients(grouped(), leaves)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_autocast_casts_as_for_sdpa(backend: str, dtype: torch.dtype) -> None:
    q, k, v, other, _ = leaves = inputs(dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = leader_attention(q, k, v, causal=True, backend=backend)
        follower = follower_attention(state, other)
        wide_k, wide_v = (t.repeat_interleave(2, 1) for t in (k, v))
        wanted = scaled_dot_product_attention(q, wide_k, wide_v, is_causal=True)
    assert out.dtype == follower.dtype == wanted.dtype
    bound = 1e-12 if dtype == torch.float64 else 1e-2
    assert (out - wanted).norm() < bound * wanted.norm()
    grads = torch.autograd.grad([out.float().sum() + follower.float().square().sum()], leaves[:4])
    assert all(grad.dtype == dtype for grad in grads)
    exact, state = leader_attention(q, k, v, causal=True, backend="reference")
    loss = exact.sum() + follower_attention(state, other).square().sum()
    for found, true in zip(grads, torch.autograd.grad(loss, leaves[:4]), strict=True):
        assert (found - true).norm() < 2e-2 * true.norm()


def test_nothing_is_cast_inside_the_operators() -> None:
    leaves = inputs(dtype=torch.bfloat16)
    wanted = values_and_gradients(grouped(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        found = values_and_gradients(grouped(), leaves)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_autocast_under_compile() -> None:
    torch._dynamo.reset()
    leaves = inputs(dtype=torch.float32)
    compiled = torch.compile(grouped(), backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        outs, wanted = compiled(*leaves), grouped()(*leaves)
    assert all(out.dtype == torch.bfloat16 for out in outs)
    torch.testing.assert_close(outs, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_ddp(world: int, tmp_path: Path) -> None:
    folder = str(tmp_path)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(train_rank, (world, folder), nprocs=world)
    model = Layers()
    (2 * model(normal(world, 20, 16, dtype=torch.float32), "reference")).backward()
    wanted = [p.grad for p in model.parameters()]
    for rank in range(world):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), wanted)
