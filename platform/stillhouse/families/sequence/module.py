"""The training step of the family `sequence`."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import PreTrainedModel

from stillhouse.data.language import LanguageData
from stillhouse.families.distiller import Distiller, OptimizerBuilder
from stillhouse.objectives.tokens import token_cross_entropy
from stillhouse.records.language import LanguageOutput, LanguageSignal, SequenceBatch
from stillhouse.records.losses import LossTerms
from stillhouse.students.causal_lm import read_output

SequenceMethod = Callable[[LanguageOutput, LanguageSignal | None, SequenceBatch], LossTerms]


class SequenceDistiller(Distiller):
    """One forward of the student, one of the teacher, one loss over the tokens that count.

    The gradient of an optimiser step is that of the mean over *all* tokens of the step: of every
    micro-batch of the accumulation window and every rank, however unequal their token counts. Each
    micro-batch therefore back-propagates the sum over its tokens, and the gradients are divided by
    the global count once, before clipping.
    """

    unit = "tokens"
    student: PreTrainedModel

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: nn.Module | None,
        method: SequenceMethod,
        optimizer: OptimizerBuilder,
    ) -> None:
        super().__init__(student, teacher, method, optimizer)
        self._tokens_in_window = torch.zeros((), dtype=torch.long)
        self._validation_sums: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: SequenceBatch, batch_idx: int) -> Tensor:
        """Return the sum of the loss over the batch's tokens, ready for accumulation."""
        signal = self.teacher(batch) if self.teacher is not None else None
        losses: LossTerms = self.method(read_output(self.student, batch), signal, batch)
        self.stop_if_not_finite(losses.total.detach(), batch_idx)
        count = batch.mask.sum()
        self._tokens_in_window = self._tokens_in_window.to(count.device) + count
        self.units_seen += int(count) * self.trainer.world_size
        self.log_dict(
            {"train_loss": losses.total.detach()}
            | {f"train_{name}": value for name, value in losses.terms.items()},
            batch_size=1,
        )
        # Lightning divides by the length of the window; the global token count does it instead.
        return losses.total * count * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into those of the global token mean."""
        tokens = self._tokens_in_window
        if self.trainer.world_size > 1:
            tokens = self.all_gather(tokens).sum()  # type: ignore[union-attr]
        # Strategies average gradients over ranks, the count is summed over them.
        scale = self.trainer.world_size / tokens.clamp_min(1)
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"]]
        torch._foreach_mul_([g for g in gradients if g is not None], scale.to(self.device))
        self._tokens_in_window = torch.zeros_like(self._tokens_in_window)

    def validation_step(self, batch: SequenceBatch, batch_idx: int) -> None:
        """Sum the student's negative log-likelihood over the batch's tokens."""
        nll = token_cross_entropy(read_output(self.student, batch), batch.labels, batch.mask)
        count = batch.mask.sum()
        self._validation_sums.append((nll * count, count))

    def on_validation_epoch_end(self) -> None:
        """Log `val_nll`, nats a token, over all validation tokens."""
        total, count = (torch.stack(t).sum() for t in zip(*self._validation_sums, strict=True))
        self._validation_sums.clear()
        if self.trainer.world_size > 1:
            total, count = self.all_gather(total).sum(), self.all_gather(count).sum()  # type: ignore[union-attr]
        self.log("val_nll", total / count)

    def export(self, folder: Path, data: LanguageData) -> None:  # type: ignore[override]
        """Write student and tokenizer as an ordinary `transformers` folder."""
        self.student.save_pretrained(folder)
        data.tokenizer.save_pretrained(folder)
