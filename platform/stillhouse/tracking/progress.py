"""The progress bar of a training stage: stage, step, loss, units per second, time left."""

import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

# Drawing costs time that training could use: a terminal is redrawn this often, a log file spoken
# to that often (seconds).
REDRAW = 0.25
LOG_EVERY = 15.0


class StageProgress(ProgressBar):
    """One bar a stage on a terminal, a line now and then elsewhere."""

    def __init__(self, stage: str, console: Console) -> None:
        super().__init__()
        self.stage = stage
        self.console = console
        self._progress: Progress | None = None
        self._began = 0.0
        self._shown = 0.0
        self._steps_before = 0
        self._units_before = 0

    def disable(self) -> None:
        """Lightning calls this on ranks that must not draw."""
        self._shown = float("inf")

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the bar at the step that training starts or goes on at."""
        self._began = time.monotonic()
        self._steps_before = trainer.global_step
        self._units_before = pl_module.units_seen  # type: ignore[assignment]
        if trainer.global_step:
            self.console.print(f"{self.stage}: going on from step {trainer.global_step}")
        if self.console.is_terminal and self._shown != float("inf"):
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._progress.start()
            self._progress.add_task(
                self.stage,
                total=trainer.max_steps,
                completed=trainer.global_step,
                facts="",
            )

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show the step, at most a few times a second."""
        now = time.monotonic()
        last = trainer.global_step >= trainer.max_steps
        pause = REDRAW if self._progress is not None else LOG_EVERY
        if now - max(self._shown, self._began) < pause and not last:
            return
        if self._shown == float("inf"):
            return
        self._shown = now
        units = pl_module.units_seen - self._units_before  # type: ignore[operator]
        rate = units / max(now - self._began, 1e-9)
        loss = trainer.callback_metrics.get("train_loss", trainer.progress_bar_metrics.get("loss"))
        facts = f"loss {float(loss):.3f}  " if loss is not None else ""
        facts += f"{short(float(rate))} {pl_module.unit}/s"
        if self._progress is not None:
            task = self._progress.task_ids[0]
            self._progress.update(task, completed=trainer.global_step, facts=facts)
        else:
            done = trainer.global_step - self._steps_before
            left = (now - self._began) / max(done, 1) * (trainer.max_steps - trainer.global_step)
            self.console.print(
                f"{self.stage}: step {trainer.global_step}/{trainer.max_steps}  {facts}  "
                f"{left:.0f} s left"
            )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the bar, also after a failure."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def short(number: float) -> str:
    """Return a number in a few characters: 12.3k, 4.5M."""
    for size, suffix in ((1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{suffix}"
    return f"{number:.0f}"
