"""The squared error between hidden states: its reduction, precision and gradient."""

import pytest
import torch
from torch import Tensor

from stillhouse.objectives.features import hidden_mse


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_the_mean_over_tokens_and_features() -> None:
    S, T = draw(5, 7, seed=0).requires_grad_(), draw(5, 7, seed=1).requires_grad_()
    loss = hidden_mse(S, T)
    expected = sum((S[n, d] - T[n, d]) ** 2 for n in range(5) for d in range(7)) / 35
    torch.testing.assert_close(loss, expected)
    loss.backward()
    torch.testing.assert_close(S.grad, 2 * (S - T).detach() / 35)
    assert T.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    # The square of the difference of 300 is above the largest number of float16.
    S, T = (100 * draw(50, 30, seed=seed).to(dtype) for seed in (0, 1))
    S[0, 0], T[0, 0] = 150, -150
    loss = hidden_mse(S, T)
    assert loss.dtype == torch.float32
    exact = hidden_mse(S.double(), T.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)


def test_no_token_at_all_gives_zero_and_a_gradient() -> None:
    S = draw(0, 7, seed=0).requires_grad_()
    loss = hidden_mse(S, draw(0, 7, seed=1))
    loss.backward()
    assert loss.item() == 0.0
    assert S.grad is not None
