"""Optimisers with their schedules, as `conf/optimizer/*.yaml` names them."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from stillhouse.errors import UserError
from stillhouse.ranges import Positive, Share, Weight


def adamw(
    module: nn.Module,
    max_steps: int,
    *,
    learning_rate: Positive,
    weight_decay: Weight = 0.1,
    betas: Sequence[float] = (0.9, 0.95),
    eps: Positive = 1e-8,
    warmup_fraction: Share = 0.05,
    final_fraction: Share = 0.05,
) -> OptimizerLRScheduler:
    """AdamW with a linear warm-up and a cosine decay over the stage's steps.

    Args:
        module: its trainable parameters are optimised; those of two or more dimensions decay.
        max_steps: optimiser steps of the whole stage.
        learning_rate: the peak.
        weight_decay: decoupled, on matrices only.
        betas, eps: of Adam.
        warmup_fraction: share of `max_steps` over which the rate rises to its peak.
        final_fraction: rate at the last step as a share of the peak.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(
        [g for g in groups if g["params"]],
        lr=learning_rate,
        betas=(betas[0], betas[1]),
        eps=eps,
    )
    warmup = max(1, round(warmup_fraction * max_steps))

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / warmup)
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / max_steps)))
        return rise * (final_fraction + (1 - final_fraction) * fall)

    schedule = LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def taking_turns(
    parts: Sequence[tuple[Any, Callable[[int], int]]],
) -> OptimizerLRScheduler:
    """Join optimisers of one kind, each of which learns in some of the steps.

    What has no gradient in a step is passed over by torch's optimisers, with its state.

    Args:
        parts: what a builder made, and how often it has learnt before a step of the whole.

    Raises:
        UserError: for optimisers of several kinds.
    """
    kinds = {type(built["optimizer"]) for built, _ in parts}
    if len(kinds) > 1:
        names = " and ".join(sorted(kind.__name__ for kind in kinds))
        raise UserError(f"optimizer: phases are given {names}; expected one kind for all")
    groups, factors = [], []
    for built, updates in parts:
        schedule: LambdaLR = built["lr_scheduler"]["scheduler"]
        for group, factor in zip(built["optimizer"].param_groups, schedule.lr_lambdas, strict=True):
            rate = group["initial_lr"]
            groups.append({k: v for k, v in group.items() if k != "initial_lr"} | {"lr": rate})
            factors.append(partial(_at_update, factor, updates))
    optimizer = kinds.pop()(groups)
    schedule = LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _at_update(factor: Callable[[int], float], updates: Callable[[int], int], step: int) -> float:
    return factor(updates(step))
