"""What ReLU linear attention and its jvp refuse, each in one line."""

from typing import Any

import pytest
import torch
from attention_cases import normal
from linear_cases import draw
from torch import Tensor

from stillhouse_kernels.linear_attention import relu_linear_attention, relu_linear_attention_jvp


def refusal(*six: Tensor, **options: Any) -> list[str]:
    """What both functions say, or the one that takes tangents."""
    calls = [lambda: relu_linear_attention_jvp(*six, **options)]
    if len(six) == 3:
        calls.append(lambda: relu_linear_attention(*six, **options))
    said = []
    for call in calls:
        with pytest.raises(ValueError, match=":") as refused:
            call()
        said.append(str(refused.value))
    names = ("relu_linear_attention_jvp: ", "relu_linear_attention: ")
    return [message.removeprefix(name) for message, name in zip(said, names, strict=False)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {0: normal(2, 6, 12)},
            "q (2, 6, 12), k (2, 2, 23, 12), v (2, 2, 23, 20): expected [batch, heads, tokens, "
            "head_dim] each, no size 0",
        ),
        (
            {1: normal(2, 2, 23, 11)},
            "q (2, 6, 50, 12), k (2, 2, 23, 11), v (2, 2, 23, 20): expected one batch size, and "
            "one head dim in q and k",
        ),
        (
            {2: normal(2, 2, 22, 20)},
            "q (2, 6, 50, 12), k (2, 2, 23, 12), v (2, 2, 22, 20): expected k and v of equal heads "
            "and tokens",
        ),
        (
            {0: normal(2, 5, 50, 12)},
            "q (2, 5, 50, 12), k (2, 2, 23, 12), v (2, 2, 23, 20): 2 key/value heads do not divide "
            "5 query heads",
        ),
        (
            {1: normal(2, 2, 23, 12, dtype=torch.float32)},
            "q torch.float64, k torch.float32, v torch.float64: expected one floating-point dtype; "
            "cast with .to()",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(change: dict[int, Tensor], message: str) -> None:
    three = [change.get(i, t) for i, t in enumerate(draw()[:3])]
    assert set(refusal(*three)) == {message}


@pytest.mark.parametrize("eps", [0.0, -1e-15, 1e-31, 2.0, float("nan")])
def test_an_eps_that_float32_does_not_hold_is_refused(eps: float) -> None:
    assert set(refusal(*draw()[:3], eps=eps)) == {
        f"eps={eps!r}: expected a number from 1e-30 to 1; it keeps a row that sees no key from "
        "dividing by 0"
    }


def test_a_backend_that_is_unknown_or_cannot_run_is_refused() -> None:
    three = draw()[:3]
    assert set(refusal(*three, backend="flash")) == {
        "backend='flash': expected one of auto, reference, streaming, triton"
    }
    pytest.importorskip("triton")
    assert set(refusal(*three, backend="triton")) == {
        "backend='triton': the dtype of q is float64, the kernel takes float32, float16, bfloat16; "
        "backend='streaming' takes it"
    }


def test_a_tangent_that_does_not_fit_its_primal_is_refused() -> None:
    six = draw()
    assert refusal(*six[:4], six[4][:, :1], six[5]) == [
        "k_t (2, 1, 23, 12), k (2, 2, 23, 12): expected a tangent of its primal's shape"
    ]
    assert refusal(*six[:5], six[5].float()) == [
        "v_t torch.float32 on cpu, v torch.float64 on cpu: expected its primal's dtype and device; "
        "convert with .to()"
    ]
