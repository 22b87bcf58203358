"""The training step of the family `progressive`."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from stillhouse.data.encoders import EncoderData
from stillhouse.errors import UserError
from stillhouse.evaluation.classification import main_score
from stillhouse.families.distiller import Distiller, OptimizerBuilder
from stillhouse.families.window_means import WindowMeans
from stillhouse.records.encoders import EncoderBatch, EncoderOutput
from stillhouse.records.losses import LossTerms
from stillhouse.students.encoders import read_encoder
from stillhouse.students.layer_maps import LayerMap

ProgressiveMethod = Callable[[EncoderOutput, EncoderOutput | None, EncoderBatch], LossTerms]


class ProgressiveDistiller(Distiller):
    """One forward of the student, one of the teacher, one loss over the texts.

    The gradient of an optimiser step is that of the mean over *all* texts of the step: of every
    micro-batch of the accumulation window and every rank, however unequal their sizes. A text
    without a token is none.

    Args:
        student: the encoder that learns.
        teacher: called with (batch, hidden_layers, attention_layers), its own layers, and with a
            `config` that tells its shape; None for methods that have none.
        method: the loss.
        optimizer: called with (what learns, max_steps).
        layer_map: of `students.layer_maps`: which of the teacher's layers the method compares each
            layer of the student with. None: it compares no layers.
        projection: whether the student's hidden states are multiplied by a learnt W_h
            [D_s, D_t] per layer before they are compared. It begins as the identity, cut to that
            shape, and is left behind when the student is handed on.

    Raises:
        UserError: when the map names a layer that is not there, or there is no teacher to map to.
    """

    unit = "texts"
    reads_inner_layers = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: ProgressiveMethod,
        optimizer: OptimizerBuilder,
        *,
        layer_map: LayerMap | None = None,
        projection: bool = False,
    ) -> None:
        super().__init__(student, teacher, method, optimizer)
        self.layers = _matched_layers(student, teacher, layer_map)
        self.projections = nn.ModuleDict()
        if projection:
            self.projections = _projections(student, teacher, self.layers)
        self._window = WindowMeans()
        self._validation: list[tuple[Tensor, Tensor]] = []
        self._predictions: list[tuple[Tensor, Tensor]] = []

    def learning(self) -> list[nn.Module]:
        """Return the student and what its hidden states are multiplied by."""
        return [self.student, *self.projections.values()]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over the student's trainable parameters, and the projections'."""
        # A list of its own: as an attribute it would be in every checkpoint a second time.
        learning = nn.ModuleList([self.student, self.projections])
        learns = learning if self.projections else self.student
        return self._optimizer(learns, self.trainer.max_steps)

    def training_step(self, batch: EncoderBatch, batch_idx: int) -> Tensor:
        """Return the sum of the loss over the batch's texts, ready for accumulation."""
        losses = self.method(self._student_output(batch), self._signal(batch), batch)
        self.stop_if_not_finite(losses.total.detach(), batch_idx)
        count = _texts(batch)
        self._window.add(losses, count)
        # Lightning divides by the length of the window; the global number of texts does it instead.
        return losses.total * count * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into those of the mean over the window's texts; log that mean."""
        texts, means = self._window.close(optimizer, self.trainer.world_size)
        self.log_dict({f"train_{name}": mean for name, mean in means.items()}, batch_size=1)
        self.units_seen += texts

    def validation_step(self, batch: EncoderBatch, batch_idx: int) -> None:
        """Keep the method's loss, and what the student says of labelled texts, of this rank."""
        if not self.is_called_on(batch_idx):
            return
        output = self._student_output(batch)
        losses: LossTerms = self.method(output, self._signal(batch), batch)
        if not self.is_own(batch_idx):
            return
        count = _texts(batch)
        self._validation.append(((losses.total * count).cpu(), count.cpu()))
        if output.logits is not None and batch.labels is not None:
            texts = batch.attention_mask.any(-1)
            self._predictions.append((output.logits[texts].cpu(), batch.labels[texts].cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log `val_loss`, the mean over all texts, and the main score of labelled ones.

        The score has its own name, such as `val_accuracy`, and `val_score`, whatever the task.
        """
        found = self._of_every_rank((self._validation, self._predictions))
        self._validation, self._predictions = [], []
        losses = [pair for of_rank, _ in found for pair in of_rank]
        predictions = [pair for _, of_rank in found for pair in of_rank]
        total, count = (torch.stack(column).sum() for column in zip(*losses, strict=True))
        self.log("val_loss", total / count.clamp_min(1))
        if predictions:
            logits, labels = (torch.cat(column) for column in zip(*predictions, strict=True))
            name, score = main_score(logits, labels)
            self.log_dict({f"val_{name}": score, "val_score": score})

    def _student_output(self, batch: EncoderBatch) -> EncoderOutput:
        blocks = [layer for layer in self.layers if layer]
        output = read_encoder(
            self.student, batch, hidden_layers=list(self.layers), attention_layers=blocks
        )
        if not self.projections:
            return output
        states = output.hidden_states
        return replace(
            output, hidden_states={n: self.projections[str(n)](states[n]) for n in states}
        )

    def _signal(self, batch: EncoderBatch) -> EncoderOutput | None:
        """Return what the teacher says, its layers under the student's numbers."""
        if self.teacher is None:
            return None
        asked = sorted(set(self.layers.values()))
        blocks = [layer for layer in asked if layer]
        said = self.teacher(batch, hidden_layers=asked, attention_layers=blocks)
        pairs = self.layers.items()
        return replace(
            said,
            hidden_states={ours: said.hidden_states[theirs] for ours, theirs in pairs},
            attention={ours: said.attention[theirs] for ours, theirs in pairs if theirs},
        )

    def export(self, folder: Path, data: EncoderData) -> None:
        """Write student and tokenizer as an ordinary `transformers` folder, no projections."""
        student: Any = self.student
        student.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)


def _texts(batch: EncoderBatch) -> Tensor:
    return batch.attention_mask.any(-1).sum()


def _matched_layers(
    student: nn.Module, teacher: nn.Module | None, layer_map: LayerMap | None
) -> dict[int, int]:
    if layer_map is None:
        return {}
    if teacher is None:
        raise UserError(
            "stages.<stage>.family.layer_map: there is no teacher whose layers it could name; "
            "expected null, or a teacher"
        )
    return dict(layer_map(*_of_both(student, teacher, "num_hidden_layers")))


def _projections(
    student: nn.Module, teacher: nn.Module | None, layers: Mapping[int, int]
) -> nn.ModuleDict:
    """Return W_h of every matched layer: the identity, cut or filled up with zeros."""
    if teacher is None or not layers:
        raise UserError(
            "stages.<stage>.family.projection=true: no hidden states are compared; expected "
            "false, or a teacher and stages.<stage>.family.layer_map"
        )
    narrow, broad = _of_both(student, teacher, "hidden_size")
    projections = {str(layer): nn.Linear(narrow, broad, bias=False) for layer in layers}
    for projection in projections.values():
        nn.init.eye_(projection.weight)
    return nn.ModuleDict(projections)


def _of_both(student: Any, teacher: Any, name: str) -> tuple[int, int]:
    return getattr(student.config, name), getattr(teacher.config, name)
