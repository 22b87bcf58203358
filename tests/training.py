"""The bare trainer that tests of families use, and the optimiser that shows a gradient."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn


def plain_sgd(module: nn.Module, max_steps: int) -> torch.optim.SGD:
    """A step of rate 1 without state: what the parameters lose is the gradient."""
    return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)


def bare_trainer(folder: Path, **options: Any) -> pl.Trainer:
    """Return a trainer on the CPU that logs, shows and keeps nothing by itself."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(**(quiet | options))
