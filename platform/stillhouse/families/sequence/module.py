"""The training step of the family `sequence`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stillhouse.data.language import LanguageData
from stillhouse.errors import UserError
from stillhouse.families.distiller import Distiller, OptimizerBuilder
from stillhouse.families.window_means import WindowMeans
from stillhouse.objectives.tokens import token_cross_entropy
from stillhouse.records.language import LanguageOutput, LanguageSignal, SequenceBatch
from stillhouse.records.losses import LossTerms
from stillhouse.students.causal_lm import merged, read_output, without_adapters
from stillhouse_kernels.dispatch import Backend

SequenceMethod = Callable[[LanguageOutput, LanguageSignal | None, SequenceBatch], LossTerms]


class SequenceDistiller(Distiller):
    """One forward of the student, one of the teacher, one loss over the tokens that count.

    The gradient of an optimiser step is that of the mean over *all* tokens of the step: of every
    micro-batch of the accumulation window and every rank, however unequal their token counts. Each
    micro-batch therefore back-propagates the sum over its tokens, and the gradients are divided by
    the global count once, before clipping.

    Args:
        student: the model that learns.
        teacher: called with a batch; None for methods that have none.
        method: the loss.
        optimizer: called with (student, max_steps).
        layers: whose hidden states the method sees besides the last ones, in training alone: 0 the
            embeddings, i what block i hands on. None: no others.
        loss_backend: None computes losses from logits; `auto`, `streaming`, `triton` or
            `reference` is the backend of `stillhouse_kernels.linear_divergence`, which holds the
            logits of a few tokens at a time. Equal losses and gradients, to rounding.

    Raises:
        UserError: when the student has no such layer.
    """

    unit = "tokens"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: SequenceMethod,
        optimizer: OptimizerBuilder,
        *,
        layers: Sequence[int] | None = None,
        loss_backend: Backend | None = None,
    ) -> None:
        super().__init__(student, teacher, method, optimizer)
        self.layers = tuple(layers or ())
        _check_layers(student, self.layers)
        self.loss_backend: Backend | None = loss_backend
        self._window = WindowMeans()
        self._validation: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Return the sum of the loss over the batch's tokens, ready for accumulation."""
        signal = self.teacher(batch) if self.teacher is not None else None
        losses: LossTerms = self.method(self._student_output(batch, self.layers), signal, batch)
        self.stop_if_not_finite(losses.total.detach(), batch_idx)
        count = batch.mask.sum()
        self._window.add(losses, count)
        # Lightning divides by the length of the window; the global token count does it instead.
        return losses.total * count * self.trainer.accumulate_grad_batches

    def _student_output(self, batch: SequenceBatch, layers: Sequence[int] = ()) -> LanguageOutput:
        output = read_output(self.student, batch, layers=layers)
        return replace(output, loss_backend=self.loss_backend)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into those of the mean over the window's tokens; log that mean."""
        tokens, means = self._window.close(optimizer, self.trainer.world_size)
        self.log_dict({f"train_{name}": mean for name, mean in means.items()}, batch_size=1)
        self.units_seen += tokens

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Sum the student's negative log-likelihood over the tokens of this rank's batches."""
        if not self.is_called_on(batch_idx):
            return
        nll = token_cross_entropy(self._student_output(batch), batch.labels, batch.mask)
        count = batch.mask.sum()
        if self.is_own(batch_idx):
            self._validation.append(((nll * count).cpu(), count.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log `val_nll`, nats a token, over all validation tokens."""
        found = [pair for of_rank in self._of_every_rank(self._validation) for pair in of_rank]
        self._validation = []
        total, count = (torch.stack(column).sum() for column in zip(*found, strict=True))
        self.log("val_nll", total / count)

    def export(self, folder: Path, data: LanguageData) -> None:
        """Write student and tokenizer as an ordinary `transformers` folder, adapters merged."""
        merged(self.student).save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)


def _check_layers(student: nn.Module, layers: Sequence[int]) -> None:
    if not layers:
        return
    depth = without_adapters(student).config.num_hidden_layers
    if not all(0 <= layer <= depth for layer in layers):
        raise UserError(
            f"stages.<stage>.family.layers={list(layers)}: the student has the layers 0 to {depth}"
        )
