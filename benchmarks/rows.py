"""What a benchmark of kernels measures, and where."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Row:
    """Two ways to do one work, and what ours costs at the least.

    Attributes:
        work: what is done.
        against: the other way.
        ours, theirs: do it once.
        flops: of our products.
        moved: bytes that our way has to read and write.
    """

    work: str
    against: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    flops: float
    moved: float


@dataclass(frozen=True)
class Settings:
    """What the command line changes."""

    turns: int = 5
    threads: int = 2
    dtype: str = "bfloat16" if DEVICE.type == "cuda" else "float32"
    divergence: str = "forward_kl"

    def tensor(self, *shape: int, learnt: bool = True) -> Tensor:
        """Return a leaf of normal numbers."""
        made = torch.randn(*shape, device=DEVICE).to(getattr(torch, self.dtype))
        return made.requires_grad_(learnt)
