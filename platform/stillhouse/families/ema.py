"""The moving average of a student's weights: validated, handed on, and kept over a kill."""

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.families.best_weights import learnt_tensors
from stillhouse.families.distiller import Distiller
from stillhouse.ranges import Share
from stillhouse.sharding import like, whole


class MovingAverage(pl.Callback):
    """Hand on the exponential moving average of the student's weights.

    At the first updates it forgets faster, min(decay, (1 + n) / (10 + n)), so that it does not
    remember the initialisation. Validations see the average, training goes on with the weights
    themselves.
    """

    def __init__(self, *, decay: Share) -> None:
        """Say how slow the average is.

        Args:
            decay: share that is kept at an update, below 1.

        Raises:
            UserError: for 1.
        """
        if decay == 1:
            raise UserError("callbacks.ema.decay=1: it would never learn; expected below 1")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._trained: dict[str, Tensor] = {}
        self._updates = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the average and how many updates it holds."""
        average = {name: whole(t) for name, t in self._average.items()}
        return {"average": average, "updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self._average = {name: t.clone() for name, t in state_dict["average"].items()}
        self._updates = state_dict["updates"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with the weights as they are, or with what a checkpoint held."""
        learnt = _learnt(pl_module)
        if not self._average:
            self._average = {name: t.detach().clone() for name, t in learnt.items()}
        else:
            self._average = {name: like(t, learnt[name]) for name, t in self._average.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        """Move the average, once an update of the student."""
        assert isinstance(pl_module, Distiller)
        updates = pl_module.updates_at(trainer.global_step)
        if updates == self._updates:
            return
        self._updates = updates
        share = min(self.decay, (1 + self._updates) / (10 + self._updates))
        for name, tensor in _learnt(pl_module).items():
            average = self._average[name]
            if tensor.is_floating_point():
                average.lerp_(tensor.detach(), 1 - share)
            else:
                average.copy_(tensor)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the validation see the average."""
        if self._average:
            learnt = _learnt(pl_module)
            self._trained = {name: t.detach().clone() for name, t in learnt.items()}
            _put(pl_module, self._average)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Go on with the weights themselves."""
        if self._trained:
            _put(pl_module, self._trained)
            self._trained = {}

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the student."""
        _put(pl_module, self._average)


def _learnt(pl_module: pl.LightningModule) -> dict[str, Tensor]:
    assert isinstance(pl_module, Distiller)
    return learnt_tensors(pl_module.student)


@torch.no_grad()
def _put(pl_module: pl.LightningModule, values: Mapping[str, Tensor]) -> None:
    for name, tensor in _learnt(pl_module).items():
        tensor.copy_(values[name])
