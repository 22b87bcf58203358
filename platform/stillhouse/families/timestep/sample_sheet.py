"""What a generator draws while it learns: from the same noise at every validation."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.loggers import WandbLogger
from torch import Tensor

from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.ranges import Count, CountFrom2


class SampleSheet(pl.Callback):
    """Draw the samples of validations below each other, `samples.png` beside the weights.

    W&B gets those of each validation as soon as they are there. A stage that goes on after a kill
    has the earlier ones still.
    """

    def __init__(self, *, count: Count, most_validations: CountFrom2) -> None:
        """Say how large the sheet is.

        Args:
            count: pictures of a validation; of points all are drawn.
            most_validations: when there are more, every second one goes; the newest stays.
        """
        self.count = count
        self.most_validations = most_validations
        self._drawn: dict[int, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return what was drawn at which step."""
        return {"drawn": dict(self._drawn)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with what `state_dict` returned."""
        self._drawn = dict(state_dict["drawn"])

    def on_validation_end(self, trainer: Any, pl_module: pl.LightningModule) -> None:
        """Take the samples, and hand them to W&B."""
        assert isinstance(pl_module, TimestepDistiller)
        if not trainer.is_global_zero:
            return
        samples = pl_module.samples
        some = samples if samples.ndim == 2 else samples[: self.count]
        self._drawn[trainer.global_step] = trainer.datamodule.restored(some)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                newest = {trainer.global_step: self._drawn[trainer.global_step]}
                path = _draw(newest, Path(trainer.default_root_dir) / "samples.png")
                logger.log_image("samples", [str(path)], step=trainer.global_step)
        if len(self._drawn) > self.most_validations:
            self._drawn = dict(list(self._drawn.items())[::-2][::-1])

    def pictures(self) -> Mapping[str, Callable[[Path], Path]]:
        """Return the sheet, where something was drawn."""
        return {"samples": partial(_draw, self._drawn)} if self._drawn else {}


def _draw(drawn: Mapping[int, Tensor], path: Path) -> Path:
    # Imported late: a stage that draws nothing does not need it.
    from stillhouse.tracking.sample_pictures import draw_images, draw_points

    sheet: Any = {f"step {step}": values.numpy() for step, values in drawn.items()}
    points = next(iter(sheet.values())).ndim == 2
    return draw_points(sheet, path) if points else draw_images(sheet, path)
