"""Shared attention refuses bad input in one line."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import group, inputs, relative
from torch import Tensor

from stillhouse_kernels.shared_attention import (
    follower_attention,
    leader_attention,
)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=r"attention|backend") as e:
        call()
    return str(e.value)


@pytest.mark.parametrize("name", ["q", "k", "mask"])
def test_a_state_whose_inputs_changed_is_refused(name: str) -> None:
    q, k, v = (t.detach() for t in inputs((2, 1, 1), 5, 5))
    mask = torch.ones(5, 5, dtype=torch.bool) if name == "mask" else None
    _, state = leader_attention(q, k, v, mask=mask)
    follower_attention(state, v)
    {"q": q, "k": k, "mask": mask}[name].zero_()
    assert refusal(lambda: follower_attention(state, v)) == (
        f"follower_attention: {name} changed in place since the leader ran; run leader_attention "
        "again, or give it a copy"
    )


@torch.inference_mode()
def test_inference_mode_counts_no_changes() -> None:
    q, k, v = (t.clone() for t in inputs((2, 1, 1), 5, 5))
    _, state = leader_attention(q, k, v, backend="streaming")
    assert state.versions == (None, None, None)
    assert relative(follower_attention(state, v), group("reference", q, k, v)[0]) < 1e-12


def sized(*sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(size, dtype=dtype) for size in sizes]


BAD_LEADERS: dict[str, tuple[Callable[[], list[Tensor]], dict[str, Any], str]] = {
    "three axes": (
        lambda: sized((2, 4, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
        {},
        "q (2, 4, 8), k (2, 2, 9, 8), v (2, 2, 9, 8): expected [batch, heads, tokens, head_dim] "
        "each, no size 0",
    ),
    "no keys": (
        lambda: sized((2, 4, 5, 8), (2, 2, 0, 8), (2, 2, 0, 8)),
        {},
        "q (2, 4, 5, 8), k (2, 2, 0, 8), v (2, 2, 0, 8): expected [batch, heads, tokens, head_dim] "
        "each, no size 0",
    ),
    "batches": (
        lambda: sized((2, 4, 5, 8), (1, 2, 9, 8), (2, 2, 9, 8)),
        {},
        "q (2, 4, 5, 8), k (1, 2, 9, 8), v (2, 2, 9, 8): expected one batch size, and one head dim "
        "in q and k",
    ),
    "head dims": (
        lambda: sized((2, 4, 5, 8), (2, 2, 9, 7), (2, 2, 9, 8)),
        {},
        "q (2, 4, 5, 8), k (2, 2, 9, 7), v (2, 2, 9, 8): expected one batch size, and one head dim "
        "in q and k",
    ),
    "keys and values": (
        lambda: sized((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 8, 8)),
        {},
        "q (2, 4, 5, 8), k (2, 2, 9, 8), v (2, 2, 8, 8): expected k and v of equal heads and "
        "tokens",
    ),
    "groups": (
        lambda: sized((2, 4, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
        {},
        "q (2, 4, 5, 8), k (2, 3, 9, 8), v (2, 3, 9, 8): 3 key/value heads do not divide 4 query "
        "heads",
    ),
    "causal": (
        lambda: sized((2, 4, 9, 8), (2, 2, 5, 8), (2, 2, 5, 8)),
        {"causal": True},
        "q (2, 4, 9, 8), k (2, 2, 5, 8), v (2, 2, 5, 8): causal needs at least as many keys as "
        "queries; the last query is aligned with the last key",
    ),
    "dtypes": (
        lambda: [*sized((2, 4, 5, 8), (2, 2, 9, 8)), *sized((2, 2, 9, 8), dtype=torch.float16)],
        {},
        "q torch.float32, k torch.float32, v torch.float16: expected one floating-point dtype; "
        "cast with .to()",
    ),
    "integers": (
        lambda: sized((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8), dtype=torch.int64),
        {},
        "q torch.int64, k torch.int64, v torch.int64: expected one floating-point dtype; cast with "
        ".to()",
    ),
    "devices": (
        lambda: [*sized((2, 4, 5, 8), (2, 2, 9, 8)), torch.zeros(2, 2, 9, 8, device="meta")],
        {},
        "q on cpu, k on cpu, v on meta: expected one device; move with .to()",
    ),
    "additive mask": (
        lambda: sized((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
        {"mask": torch.zeros(5, 9)},
        "mask is torch.float32: expected torch.bool, True = attend; mask == 0 turns an additive "
        "mask of 0 and -inf into one",
    ),
    "mask elsewhere": (
        lambda: sized((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
        {"mask": torch.zeros(5, 9, dtype=torch.bool, device="meta")},
        "mask lies on meta, q on cpu: move it with mask.to()",
    ),
    "mask of other size": (
        lambda: sized((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
        {"mask": torch.zeros(9, 5, dtype=torch.bool)},
        "mask (9, 5), q (2, 4, 5, 8), k (2, 2, 9, 8), v (2, 2, 9, 8): expected a mask that "
        "broadcasts to [batch, heads, queries, keys] = (2, 4, 5, 9)",
    ),
}


@pytest.mark.parametrize("name", list(BAD_LEADERS))
def test_a_leader_of_bad_input_is_refused(name: str) -> None:
    tensors, options, message = BAD_LEADERS[name]
    assert (
        refusal(lambda: leader_attention(*tensors(), **options)) == f"leader_attention: {message}"
    )


def test_an_unknown_backend_is_refused() -> None:
    assert refusal(lambda: leader_attention(*sized(*[(1, 1, 2, 4)] * 3), backend="cuda")) == (
        "backend='cuda': expected one of auto, reference, streaming, triton"
    )


def test_a_head_dim_that_triton_cannot_take_is_refused() -> None:
    assert refusal(lambda: leader_attention(*sized(*[(1, 1, 2, 136)] * 3), backend="triton")) == (
        "backend='triton': the head dim is 136, the kernel takes at most 128; backend='streaming' "
        "takes it"
    )


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (
            torch.zeros(2, 3, 9, 8),
            "v (2, 3, 9, 8), the leader's q (2, 4, 5, 8), k (2, 2, 9, 8): expected v [2, heads "
            "that divide 4, 9, value_dim]",
        ),
        (
            torch.zeros(1, 2, 9, 8),
            "v (1, 2, 9, 8), the leader's q (2, 4, 5, 8), k (2, 2, 9, 8): expected v [2, heads "
            "that divide 4, 9, value_dim]",
        ),
        (
            torch.zeros(2, 2, 5, 8),
            "v (2, 2, 5, 8), the leader's q (2, 4, 5, 8), k (2, 2, 9, 8): expected v [2, heads "
            "that divide 4, 9, value_dim]",
        ),
        (
            torch.zeros(2, 2, 9, 8, dtype=torch.float64),
            "v torch.float64, the leader's q torch.float32: expected one floating-point dtype; "
            "cast with .to()",
        ),
        (
            torch.zeros(2, 2, 9, 8, device="meta"),
            "v on meta, the leader's q on cpu: expected one device; move with .to()",
        ),
    ],
)
def test_a_follower_of_bad_input_is_refused(v: Tensor, message: str) -> None:
    _, state = leader_attention(*sized((2, 4, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8)))
    assert refusal(lambda: follower_attention(state, v)) == f"follower_attention: {message}"


def test_values_that_triton_cannot_take_are_refused() -> None:
    _, state = leader_attention(*sized(*[(1, 1, 2, 16)] * 3), backend="triton")
    assert refusal(lambda: follower_attention(state, torch.zeros(1, 1, 2, 32))) == (
        "follower_attention: the value dim is 32 and the head dim 16, the kernel takes equal ones; "
        "give the leader backend='streaming', which takes it"
    )
