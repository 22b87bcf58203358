"""What attention and its jvp refuse, each in one line."""

from collections.abc import Callable

import pytest
import torch
from attention_cases import normal
from tangent_cases import tensors
from torch import Tensor

from stillhouse_kernels import attention, attention_jvp


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=":") as refused:
        call()
    return str(refused.value)


def six(**changes: object) -> list[Tensor]:
    return tensors(4, 2, queries=9, keys=12, dtype=torch.float32, **changes)


def test_dropout_is_refused() -> None:
    assert refusal(lambda: attention(*six()[:3], dropout_p=0.1)) == (
        "attention: dropout_p=0.1: expected 0; a derivative needs the same dropout in every pass, "
        "so drop the projected output instead"
    )


def test_a_mask_of_numbers_is_refused() -> None:
    mask = torch.zeros(9, 12)
    wanted = (
        "mask is torch.float32: expected torch.bool, True = attend; mask == 0 turns an additive "
        "mask of 0 and -inf into one"
    )
    assert refusal(lambda: attention(*six()[:3], mask=mask)) == f"attention: {wanted}"
    assert refusal(lambda: attention_jvp(*six(), mask=mask)) == f"attention_jvp: {wanted}"


def test_a_mask_of_another_shape_is_refused() -> None:
    mask = torch.ones(9, 9, dtype=torch.bool)
    assert refusal(lambda: attention(*six()[:3], mask=mask)) == (
        "attention: mask (9, 9), q (1, 4, 9, 8), k (1, 2, 12, 8), v (1, 2, 12, 8): expected a mask "
        "that broadcasts to [batch, heads, queries, keys] = (1, 4, 9, 12)"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {1: normal(1, 3, 12, 8).float(), 2: normal(1, 3, 12, 8).float()},
            "q (1, 4, 9, 8), k (1, 3, 12, 8), v (1, 3, 12, 8): 3 key/value heads do not divide 4 "
            "query heads",
        ),
        (
            {2: normal(1, 2, 11, 8).float()},
            "q (1, 4, 9, 8), k (1, 2, 12, 8), v (1, 2, 11, 8): expected k and v of equal heads and "
            "tokens",
        ),
        (
            {1: normal(1, 2, 12, 7).float()},
            "q (1, 4, 9, 8), k (1, 2, 12, 7), v (1, 2, 12, 8): expected one batch size, and one "
            "head dim in q and k",
        ),
        (
            {0: normal(4, 9, 8).float()},
            "q (4, 9, 8), k (1, 2, 12, 8), v (1, 2, 12, 8): expected [batch, heads, tokens, "
            "head_dim] each, no size 0",
        ),
        (
            {1: normal(1, 2, 12, 8)},
            "q torch.float32, k torch.float64, v torch.float32: expected one floating-point dtype; "
            "cast with .to()",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[int, Tensor], message: str) -> None:
    three = [change.get(i, t) for i, t in enumerate(six()[:3])]
    assert refusal(lambda: attention(*three)) == f"attention: {message}"
    assert refusal(lambda: attention_jvp(*three)) == f"attention_jvp: {message}"


def test_a_causal_call_with_more_queries_than_keys_is_refused() -> None:
    q, k, v = tensors(queries=9, keys=7)[:3]
    assert refusal(lambda: attention(q, k, v, causal=True)) == (
        "attention: q (1, 2, 9, 8), k (1, 2, 7, 8), v (1, 2, 7, 8): causal needs at least as many "
        "keys as queries; the last query is aligned with the last key"
    )


def test_a_tangent_of_another_shape_is_refused() -> None:
    q, k, v, q_t, *_ = six()
    assert refusal(lambda: attention_jvp(q, k, v, None, q_t)) == (
        "attention_jvp: k_t (1, 4, 9, 8), k (1, 2, 12, 8): expected a tangent of its primal's shape"
    )


def test_a_tangent_of_another_dtype_is_refused() -> None:
    q, k, v, *_, v_t = six()
    assert refusal(lambda: attention_jvp(q, k, v, v_t=v_t.double())) == (
        "attention_jvp: v_t torch.float64 on cpu, v torch.float32 on cpu: expected its primal's "
        "dtype and device; convert with .to()"
    )


def test_another_device_is_refused() -> None:
    q, k, v, *_, v_t = six()
    assert refusal(lambda: attention_jvp(q, k, v, v_t=v_t.to("meta"))) == (
        "attention_jvp: v_t torch.float32 on meta, v torch.float32 on cpu: expected its primal's "
        "dtype and device; convert with .to()"
    )
    assert refusal(lambda: attention(q, k.to("meta"), v)) == (
        "attention: q on cpu, k on meta, v on cpu: expected one device; move with .to()"
    )


def test_an_unknown_backend_is_refused() -> None:
    message = "backend='flash': expected one of auto, reference, streaming, triton"
    assert refusal(lambda: attention(*six()[:3], backend="flash")) == message
    assert refusal(lambda: attention_jvp(*six(), backend="flash")) == message
