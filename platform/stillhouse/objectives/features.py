"""Losses between hidden states, as pure functions of tensors."""

import torch
from jaxtyping import Float
from torch import Tensor


def hidden_mse(student: Float[Tensor, "n D"], teacher: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Mean over tokens and features of (S - T)², in float32 or better; 0 when there are no tokens.

    Args:
        student: S, rows of hidden states at the positions that count.
        teacher: T, at the same positions; no gradient flows into it.
    """
    error = _wide(student) - _wide(teacher.detach())
    return error.square().sum() / max(1, error.numel())


def _wide(states: Tensor) -> Tensor:
    return states.float() if states.dtype in (torch.float16, torch.bfloat16) else states
