"""The training step of the family `timestep`, where one network learns."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from stillhouse.data.images import ImageData
from stillhouse.data.stream import BatchStream, generator_for
from stillhouse.diffusion.solvers import check_times, ddim, few_step, uniform_grid
from stillhouse.diffusion.tangents import check_network
from stillhouse.errors import UserError
from stillhouse.evaluation.distances import sliced_wasserstein
from stillhouse.families.distiller import Distiller, OptimizerBuilder
from stillhouse.families.timestep.networks import Networks, Phase, TimestepMethod
from stillhouse.families.window_means import WindowMeans
from stillhouse.records.diffusion import ImageBatch, PairBatch
from stillhouse.records.losses import LossTerms

# Steps that a flow is integrated in at a validation.
VALIDATION_STEPS = 20
# Samples that a tangent is tried on before the first step.
TRIED = 4


class TimestepDistiller(Distiller):
    """A method's loss of a batch, one network that learns.

    What a step draws, times and noise and more, is decided by (seed, place in training, rank), and
    so the same after a resume.

    Args:
        student: what learns, a `students.denoisers.Denoiser`.
        teacher: frozen, with the same signature; None for methods that have none.
        method: the loss.
        optimizer: called with (what learns, max_steps).
        times: falling times of the few-step sampler by number of steps, which validation samples
            with and the exported pipeline keeps; empty for a flow that is integrated instead.
        guidance_scale: what the exported pipeline, and validation, tell the student by default.
        takes_tangents: whether the method takes forward-mode derivatives of the student; they are
            tried out before the first step.
        learnt_weighting: whether the loss is weighted by a learnt e^{-u(t)}.

    Attributes:
        samples: of the last validation, from the same noise every time, normalised as the data are.

    Raises:
        UserError: for times that do not fall, or are more or fewer than their number of steps; in
            training, for a learnt weighting that the method does not read.
    """

    unit = "images"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: TimestepMethod,
        optimizer: OptimizerBuilder,
        *,
        times: Mapping[str, Sequence[float]],
        guidance_scale: float,
        takes_tangents: bool,
        learnt_weighting: bool,
    ) -> None:
        super().__init__(student, teacher, method, optimizer)
        for steps, values in times.items():
            key = f"stages.<stage>.family.times.{steps}"
            check_times(values, key=key)
            if str(len(values)) != str(steps):
                raise UserError(f"{key}={list(values)}: expected {steps} times, one of each step")
        self.times = times
        self.guidance_scale = guidance_scale
        self.takes_tangents = takes_tangents
        self.log_variance = LogVariance() if learnt_weighting else None
        self._window = WindowMeans()
        self._generated: list[tuple[Tensor, Tensor]] = []
        self.samples = torch.empty(0)

    @property
    def networks(self) -> Networks:
        """What the method is called with."""
        student: Any = self.student
        teacher: Any = self.teacher
        return Networks(student, teacher, self.log_variance)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over the student and what is learnt beside it."""
        learnt = [m for m in (self.student, self.log_variance) if m is not None]
        return self._optimizer(nn.ModuleList(learnt), self.trainer.max_steps)

    def on_train_start(self) -> None:
        """Refuse a student whose tangent is missing or wrong, before it is trained on."""
        super().on_train_start()
        if not self.takes_tangents:
            return
        trainer: Any = self.trainer
        batch: ImageBatch = next(iter(trainer.datamodule.val_dataloader())).to(self.device)
        x, condition = batch.x_0[:TRIED], batch.condition.first(TRIED)
        t = torch.linspace(0.4, 1.2, len(x), dtype=torch.double, device=self.device)
        scale = torch.full_like(t, self.guidance_scale)
        student: Any = self.student
        check_network(self.student, lambda x, t: student(x, t, condition, scale), x, t)

    def training_step(self, batch: ImageBatch | PairBatch, batch_idx: int) -> Tensor:
        """Return the sum of the loss over the batch's samples, ready for accumulation."""
        stream = self.trainer.train_dataloader
        assert isinstance(stream, BatchStream)
        generator = generator_for(stream.seed, batch_idx, self.global_rank)
        phase = Phase(self.global_step, self.trainer.max_steps)
        losses: LossTerms = self.method(self.networks, batch, phase, generator)
        count = torch.tensor(len(batch.x_0), device=self.device)
        self.stop_if_not_finite(losses.total.detach(), batch_idx)
        self._window.add(losses, count)
        # Lightning divides by the length of the window; the global count does it instead.
        return losses.total * count * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into those of the mean over the window's samples; log that mean."""
        if self.log_variance is not None and self.log_variance.line.weight.grad is None:
            raise UserError(
                "stages.<stage>.family.learnt_weighting=true: this method does not weight its loss "
                "by what is learnt; expected false"
            )
        images, means = self._window.close(optimizer, self.trainer.world_size)
        self.log_dict({f"train_{name}": mean for name, mean in means.items()}, batch_size=1)
        self.units_seen += images

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Sample as many as the batch has, alike every time, of its conditions."""
        if batch_idx % self.trainer.world_size != self.global_rank:
            return
        sampled = self.sampled(batch, generator_for(batch_idx))
        self._generated.append((sampled.cpu(), batch.x_0.cpu()))

    def on_validation_epoch_end(self) -> None:
        """Log `val_sliced_wasserstein`, between samples and data as the network sees them."""
        found = [pair for of_rank in self._of_every_rank(self._generated) for pair in of_rank]
        self._generated = []
        self.samples, real = (torch.cat(column) for column in zip(*found, strict=True))
        self.log("val_sliced_wasserstein", sliced_wasserstein(self.samples, real))

    def sampled(self, batch: ImageBatch, generator: torch.Generator) -> Tensor:
        """Return samples of the batch's conditions, in the fewest steps that the student is for."""
        student: Any = self.student
        noise = torch.randn(batch.x_0.shape, generator=generator).to(batch.x_0)
        scale = torch.full((len(noise),), self.guidance_scale, device=noise.device).double()

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return student(x, t, batch.condition, scale)

        with torch.no_grad():
            if not self.times:
                return ddim(velocity, noise, uniform_grid(VALIDATION_STEPS))
            return few_step(velocity, noise, min(self.times.values(), key=len), generator)

    def export(self, folder: Path, data: ImageData) -> None:
        """Write the student as a pipeline of diffusers."""
        student: Any = self.student
        student.save(folder, data, times=self.times, guidance_scale=self.guidance_scale)


class LogVariance(nn.Module):
    """u(t), a line in the cosines of t; it begins at 0 (2410.11081, Sec. 4.2; 2312.02696)."""

    def __init__(self, features: int = 16) -> None:
        super().__init__()
        self.octaves = nn.Buffer(torch.arange(features, dtype=torch.double), persistent=False)
        self.line = nn.Linear(features, 1)
        nn.init.zeros_(self.line.weight)
        nn.init.zeros_(self.line.bias)

    def forward(self, t: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return u."""
        waves = torch.cos(t.double()[:, None] * self.octaves)
        return self.line(waves.to(self.line.weight.dtype)).squeeze(1)
