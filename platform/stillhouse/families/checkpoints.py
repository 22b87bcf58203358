"""Checkpoints to go on from after a kill: the newest one, whole or not at all."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint


def checkpoint_folder(scratch: Path) -> Path:
    """Return where a stage that works in `scratch` keeps its checkpoints."""
    return scratch / "checkpoints"


def latest_checkpoint(scratch: Path) -> Path | None:
    """Return the checkpoint of the highest step, or None."""
    found = checkpoint_folder(scratch).glob("step=*.ckpt")
    return max(found, key=lambda path: int(path.stem.partition("=")[2]), default=None)


class ResumeCheckpoint(Checkpoint):
    """Keep the newest checkpoint, written right after an optimiser step.

    Gradients are empty there, so a checkpoint never falls into an accumulation window. The older
    one goes only when the newer one stands under its final name.
    """

    def __init__(self, *, checkpoint_every_n_steps: int) -> None:
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
        if step == self._last_step or step % self.checkpoint_every_n_steps:
            return
        self._last_step = step
        folder = checkpoint_folder(Path(trainer.default_root_dir))
        older = list(folder.glob("step=*.ckpt"))
        trainer.save_checkpoint(folder / f"step={step}.ckpt")
        if trainer.is_global_zero:
            for path in older:
                path.unlink(missing_ok=True)
