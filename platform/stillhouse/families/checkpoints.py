"""Checkpoints to go on from after a kill: the newest one, whole or not at all."""

import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint

from stillhouse.ranges import Count


def checkpoint_folder(scratch: Path) -> Path:
    """Return where a stage that works in `scratch` keeps its checkpoints."""
    return scratch / "checkpoints"


def latest_checkpoint(scratch: Path) -> Path | None:
    """Return the checkpoint of the highest step, or None."""
    found = checkpoint_folder(scratch).glob("step=*.ckpt")
    return max(found, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Return the optimiser step after which a checkpoint was written."""
    return int(checkpoint.stem.partition("=")[2])


class ResumeCheckpoint(Checkpoint):
    """Keep the newest checkpoint, written right after an optimiser step.

    Gradients are empty there, so a checkpoint never falls into an accumulation window. A step that
    is validated is passed over, and the next one taken: with a validation after every step, nothing
    is kept. The older one goes only when the newer one stands under its final name.
    """

    def __init__(self, *, checkpoint_every_n_steps: Count) -> None:
        self.checkpoint_every_n_steps = checkpoint_every_n_steps
        self._last_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count from the step that training starts or goes on at."""
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint when enough optimiser steps have passed."""
        step = trainer.global_step
        if step - self._last_step < self.checkpoint_every_n_steps or step >= trainer.max_steps:
            return
        # Half a window's gradients would be lost: after a batch that was passed over for its
        # validation, the next one is in the middle of a window.
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Going on from here would skip a validation that follows this batch: wait for the next one.
        interval = trainer.val_check_batch
        if isinstance(interval, int) and (batch_idx + 1) % interval == 0:
            return
        self._last_step = step
        folder = checkpoint_folder(Path(trainer.default_root_dir))
        older = list(folder.glob("step=*.ckpt"))
        partial = folder / "partial.ckpt"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, folder / f"step={step}.ckpt")
            for path in older:
                path.unlink(missing_ok=True)
