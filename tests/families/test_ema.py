"""The moving average of weights: what it is, who sees it, and what a checkpoint keeps."""

from typing import Any
from unittest.mock import create_autospec

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.families.distiller import Distiller
from stillhouse.families.ema import MovingAverage


def module() -> Any:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    student[0].bias.requires_grad_(False)
    return Distiller(student, None, lambda: None, lambda *_: None)


def trainer_at(step: int) -> Any:
    trainer = create_autospec(pl.Trainer, instance=True)
    trainer.global_step = step
    return trainer


def moved(average: MovingAverage, distiller: Distiller, steps: range) -> list[torch.Tensor]:
    """Take steps; return the weight at each."""
    seen: list[torch.Tensor] = []
    for step in steps:
        with torch.no_grad():
            distiller.student[0].weight.add_(1.0)
            distiller.student[1].num_batches_tracked.add_(1)
        seen.append(distiller.student[0].weight.detach().clone())
        trainer = trainer_at(step + 1)
        average.on_train_batch_end(trainer, distiller)
        # A batch of the same accumulation window is no update.
        average.on_train_batch_end(trainer, distiller)
    return seen


def test_it_is_the_average_and_is_handed_on() -> None:
    distiller, average, trainer = module(), MovingAverage(decay=0.5), trainer_at(0)
    expected = distiller.student[0].weight.detach().clone()
    bias = distiller.student[0].bias.clone()
    average.on_train_start(trainer, distiller)
    for step, weight in enumerate(moved(average, distiller, range(6)), 1):
        share = min(0.5, (1 + step) / (10 + step))
        expected = share * expected + (1 - share) * weight
    trained = distiller.student[0].weight.detach().clone()
    average.on_validation_start(trainer, distiller)
    torch.testing.assert_close(distiller.student[0].weight, nn.Parameter(expected))
    average.on_validation_end(trainer, distiller)
    assert torch.equal(distiller.student[0].weight, trained)
    average.on_train_end(trainer, distiller)
    torch.testing.assert_close(distiller.student[0].weight, nn.Parameter(expected))
    assert distiller.student[1].num_batches_tracked == 6
    assert torch.equal(distiller.student[0].bias, bias)


def test_a_checkpoint_goes_on_with_it() -> None:
    distillers = [module(), module()]
    averages = [MovingAverage(decay=0.9), MovingAverage(decay=0.9)]
    trainer = trainer_at(0)
    averages[0].on_train_start(trainer, distillers[0])
    moved(averages[0], distillers[0], range(3))
    state = averages[0].state_dict()
    distillers[1].student.load_state_dict(distillers[0].student.state_dict())
    averages[1].load_state_dict(state)
    averages[1].on_train_start(trainer, distillers[1])
    for average, distiller in zip(averages, distillers, strict=True):
        moved(average, distiller, range(3, 6))
        average.on_train_end(trainer, distiller)
    weights = [d.student.state_dict() for d in distillers]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_decay_of_1_is_refused() -> None:
    with pytest.raises(UserError) as refusal:
        MovingAverage(decay=1.0)
    assert str(refusal.value) == ("callbacks.ema.decay=1: it would never learn; expected below 1")
