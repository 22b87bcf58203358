"""A classifier of pictures, whose features measure how near samples are to the data.

    L = -mean log softmax(z(x))_y      over the pictures of a batch, shifted at random

Its method is the augmentation, a function `(values, generators, *, …) -> values` with a generator a
picture.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from stillhouse.data.images import ImageData
from stillhouse.data.stream import BatchStream, generator_for
from stillhouse.errors import UserError
from stillhouse.families.distiller import Distiller, OptimizerBuilder
from stillhouse.families.window_means import WindowMeans
from stillhouse.ranges import CountFrom0
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms
from stillhouse.students.classifiers import SmallClassifier

Augmentation = Callable[
    [Float[Tensor, "B C H W"], Sequence[torch.Generator]], Float[Tensor, "B C H W"]
]


def shifted(
    values: Float[Tensor, "B C H W"],
    generators: Sequence[torch.Generator],
    *,
    pixels: CountFrom0 = 1,
) -> Float[Tensor, "B C H W"]:
    """Move every picture by some pixels, its border repeated.

    Args:
        values: the pictures.
        generators: of each.
        pixels: the most, in each direction.
    """
    padded = F.pad(values, [pixels] * 4, mode="replicate")
    height, width = values.shape[2:]
    rows: list[Tensor] = []
    for picture, generator in zip(padded, generators, strict=True):
        top, left = torch.randint(2 * pixels + 1, (2,), generator=generator).tolist()
        rows.append(picture[:, top : top + height, left : left + width])
    return torch.stack(rows)


class ImageClassifier(Distiller):
    """A classifier that learns from labels.

    Args:
        student: of `students.classifiers`.
        teacher: None.
        method: the augmentation.
        optimizer: called with (what learns, max_steps).

    Raises:
        UserError: for a teacher.
    """

    unit = "images"

    def __init__(
        self,
        student: SmallClassifier,
        teacher: nn.Module | None,
        method: Augmentation,
        optimizer: OptimizerBuilder,
    ) -> None:
        super().__init__(student, teacher, method, optimizer)
        if teacher is not None:
            raise UserError("teacher: labels alone are learnt from here; expected teacher=null")
        self._window = WindowMeans()
        self._right: list[Tensor] = []

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """Return the sum of the loss over the batch's pictures, ready for accumulation."""
        stream = self.trainer.train_dataloader
        assert isinstance(stream, BatchStream)
        generators = [generator_for(stream.seed, *key) for key in stream.keys(batch_idx)]
        labels = batch.condition.labels
        assert labels is not None
        logits = self.student(self.method(batch.x_0, generators)).logits
        loss = F.cross_entropy(logits.float(), labels)
        self.stop_if_not_finite(loss.detach(), batch_idx)
        count = torch.tensor(len(batch.x_0), device=self.device)
        self._window.add(LossTerms(loss), count)
        return loss * count * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into those of the mean over the window's pictures; log it."""
        images, means = self._window.close(optimizer, self.trainer.world_size)
        self.log("train_loss", means["loss"], batch_size=1)
        self.units_seen += images

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Keep which of this rank's pictures are told right."""
        if not self.is_called_on(batch_idx):
            return
        found = self.student(batch.x_0).logits.argmax(1)
        if self.is_own(batch_idx):
            self._right.append((found == batch.condition.labels).cpu())

    def on_validation_epoch_end(self) -> None:
        """Log `val_accuracy`."""
        found = [rows for of_rank in self._of_every_rank(self._right) for rows in of_rank]
        self._right = []
        self.log("val_accuracy", torch.cat(found).double().mean())

    def export(self, folder: Path, data: ImageData) -> None:
        """Write the classifier as a model of diffusers."""
        student: Any = self.student
        student.save_pretrained(folder)
