"""The best weights of a fit: kept at a validation, put back at the end; and when to stop."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from stillhouse.errors import TrainingDiverged, UserError, did_you_mean
from stillhouse.families.distiller import Distiller
from stillhouse.ranges import Count
from stillhouse.sharding import like, whole

# What families log at a validation is called so.
VALIDATION = "val_"


class BestWeights(pl.Callback):
    """Hand on the student as it was at its best validation, and stop when no better one comes.

    Only a value that is really better counts; of equal ones the earliest stays. What was kept is in
    every checkpoint, so that a killed fit goes on with it. Rank 0 decides for all ranks.

    Attributes:
        key: where it stands in the config, for messages; the stage that builds it writes it.
    """

    key = "stages.<stage>.own_callbacks.<name>"

    def __init__(self, *, watched: str, greater_is_better: bool, patience: Count | None) -> None:
        """Say what is best.

        Args:
            watched: what the family logs at a validation, such as `val_score` or `val_loss`.
            greater_is_better: whether the best value is the greatest one, else the smallest.
            patience: stop at the n-th validation in a row without a gain; None never stops.
        """
        self.watched = watched
        self.greater_is_better = greater_is_better
        self.patience = patience
        self._weights: Mapping[str, Tensor] = {}
        self._found: Mapping[str, float] = {}
        self._step = 0
        self._waited = 0

    @property
    def state_key(self) -> str:
        """Tell two of these in one fit apart by what they watch."""
        return f"{type(self).__name__}.{self.watched}"

    def state_dict(self) -> dict[str, Any]:
        """Return the best weights, where and how good they were, and how long no better came."""
        return {
            "weights": dict(self._weights),
            "found": dict(self._found),
            "step": self._step,
            "waited": self._waited,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self._weights = {name: t.cpu() for name, t in state_dict["weights"].items()}
        self._found = state_dict["found"]
        self._step, self._waited = state_dict["step"], state_dict["waited"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuse a fit that ends before its first validation.

        Raises:
            UserError: naming the interval.
        """
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        if not trainer.enable_validation or (trainer.val_check_batch or 0) > batches:
            raise UserError(
                f"trainer.val_check_interval={trainer.val_check_interval}: the stage ends after "
                f"{batches} batches, before any validation could tell the best weights; expected "
                f"{batches} or less, or {self.key}=null"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keep the weights if they are the best so far, else stop if that has gone on too long.

        Raises:
            UserError: when no validation logs what is watched.
        """
        logged = trainer.callback_metrics.items()
        said: dict[str, float] = trainer.strategy.broadcast(
            {name: float(value) for name, value in logged if name.startswith(VALIDATION)}
        )
        if self.watched not in said:
            raise UserError(
                f"{self.key}.watched={self.watched}: the validation of this stage logs no such "
                f"value; expected {' or '.join(sorted(said))}{did_you_mean(self.watched, said)}"
            )
        if self._is_gain(said[self.watched]):
            assert isinstance(pl_module, Distiller)
            self._found, self._step, self._waited = said, trainer.global_step, 0
            learnt = learnt_tensors(pl_module.student)
            self._weights = {n: whole(t.detach()).to("cpu", copy=True) for n, t in learnt.items()}
            return
        self._waited += 1
        if self.patience is not None and self._waited >= self.patience:
            trainer.should_stop = True

    @torch.no_grad()
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the best weights back.

        Raises:
            TrainingDiverged: when no validation found a finite value.
        """
        if not self._found:
            raise TrainingDiverged(
                f"no validation found a finite {self.watched}, so no weights are the best; lower "
                "optimizer.learning_rate, or clip with trainer.gradient_clip_val"
            )
        assert isinstance(pl_module, Distiller)
        for name, tensor in learnt_tensors(pl_module.student).items():
            tensor.copy_(like(self._weights[name], tensor))

    def report(self) -> Mapping[str, float | int]:
        """Return the step of the weights that are handed on, and their validation's values."""
        return {"best_step": self._step, **self._found}

    def remarks(self) -> Sequence[str]:
        """Say which weights are handed on, and whether the fit was stopped."""
        said = f"the weights of step {self._step} are handed on, {self.watched} "
        said += f"{self._found[self.watched]:.4g}"
        if self.patience is not None and self._waited >= self.patience:
            said += f"; stopped after {self._waited} validations without a gain"
        return [said]

    def _is_gain(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if not self._found:
            return True
        best = self._found[self.watched]
        return value > best if self.greater_is_better else value < best


def learnt_tensors(student: nn.Module) -> dict[str, Tensor]:
    """Return what of a student's state a fit changes: trainable parameters, and buffers."""
    state = student.state_dict(keep_vars=True)
    return {
        name: tensor
        for name, tensor in state.items()
        if tensor.requires_grad or not isinstance(tensor, nn.Parameter)
    }
