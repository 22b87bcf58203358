"""The training step of the family `timestep`: a student, and networks that take turns with it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
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
from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluation.distances import sliced_wasserstein
from stillhouse.families.distiller import Distiller, OptimizerBuilder
from stillhouse.families.optimizers import taking_turns
from stillhouse.families.timestep.networks import Networks, Phase, TimestepMethod
from stillhouse.families.timestep.turns import STUDENT, Turn, Turns
from stillhouse.families.window_means import WindowMeans
from stillhouse.records.diffusion import ImageBatch, PairBatch

# Steps that a flow is integrated in at a validation.
VALIDATION_STEPS = 20
# Samples that a tangent is tried on before the first step.
TRIED = 4
# Networks besides the student that a phase may train.
OTHERS = ("fake_score", "discriminator")


class TimestepDistiller(Distiller):
    """A method's loss of a batch, for the network whose turn it is.

    What a step draws, times and noise and more, is decided by (seed, place in training, rank), and
    so the same after a resume; so is whose turn it is. Only its networks have gradients then, and
    the optimiser passes the others over. The budget, `trainer.max_steps`, is the student's updates.

    Args:
        student: what learns, a `students.denoisers.Denoiser`.
        teacher: frozen, with the same signature; None for methods that have none.
        method: the loss; with phases, one by name for `student` and for each of them.
        optimizer: of the student, called with (what learns, how often it will).
        times: falling times of the few-step sampler by number of steps, which validation samples
            with and the exported pipeline keeps; None leaves a number out; empty for a flow that
            is integrated instead.
        guidance_scale: what the exported pipeline, and validation, tell the student by default.
        takes_tangents: whether the method takes forward-mode derivatives of the student; they are
            tried out before the first step.
        learnt_weighting: whether the loss is weighted by a learnt e^{-u(t)}.
        phases: besides the student's, of `turns`.
        fake_score: of `teachers.fake_scores`, called with (teacher); None for none.
        discriminator: of `students.discriminators`, called with (fake score), or with (teacher)
            where there is no fake score; None for none.

    Attributes:
        samples: of the last validation, from the same noise every time, normalised as the data are.

    Raises:
        UserError: for times that do not fall, or are more or fewer than their number of steps; for
            a phase without a loss, without a network or without anything that learns; in training,
            for a learnt weighting that the method does not read.
    """

    unit = "images"

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: TimestepMethod | Mapping[str, TimestepMethod],
        optimizer: OptimizerBuilder,
        *,
        times: Mapping[str, Sequence[float] | None],
        guidance_scale: float,
        takes_tangents: bool,
        learnt_weighting: bool,
        phases: Mapping[str, Turn] | None = None,
        fake_score: Callable[[Any], nn.Module] | None = None,
        discriminator: Callable[[Any], nn.Module] | None = None,
    ) -> None:
        methods = {STUDENT: method} if callable(method) else dict(method)
        phases = phases or {}
        if set(methods) != {STUDENT, *phases}:
            raise UserError(
                f"method: it has losses for {', '.join(methods)}, the phases are "
                f"{', '.join([STUDENT, *phases])}; expected stages.<stage>.family.phases with a "
                "phase for each loss besides the student's"
            )
        for name, made in (("fake_score", fake_score), ("discriminator", discriminator)):
            if made is not None and teacher is None:
                raise UserError(
                    f"stages.<stage>.teacher=null: stages.<stage>.family.{name} is made of the "
                    "teacher; expected teacher=denoiser"
                )
        super().__init__(student, teacher, methods[STUDENT], optimizer)
        times = {steps: values for steps, values in times.items() if values is not None}
        for steps, values in times.items():
            key = f"stages.<stage>.family.times.{steps}"
            check_times(values, key=key)
            if str(len(values)) != str(steps):
                raise UserError(f"{key}={list(values)}: expected {steps} times, one of each step")
        self.times = times
        self.guidance_scale = guidance_scale
        self.takes_tangents = takes_tangents
        self.log_variance = LogVariance() if learnt_weighting else None
        self.fake_score = fake_score(teacher) if fake_score else None
        trunk = teacher if self.fake_score is None else self.fake_score
        self.discriminator = discriminator(trunk) if discriminator else None
        self.methods = methods
        self.turns = Turns(phases)
        self._learnt = self._trained_by_phase()
        self._window = WindowMeans()
        self._generated: list[tuple[Tensor, Tensor]] = []
        self.samples = torch.empty(0)

    @property
    def networks(self) -> Networks:
        """What the method is called with."""
        student: Any = self.student
        teacher: Any = self.teacher
        fake_score: Any = self.fake_score
        return Networks(student, teacher, self.log_variance, fake_score, self.discriminator)

    def learning(self) -> list[nn.Module]:
        """Return the student, what is learnt beside it, and what takes turns with it."""
        beside = (self.log_variance, self.fake_score, self.discriminator)
        return [self.student, *(network for network in beside if network is not None)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser: a group for each phase, each with a schedule of its own updates."""
        steps = self.trainer.max_steps
        learnt = [m for m in (self.student, self.log_variance) if m is not None]
        own = self._optimizer(nn.ModuleList(learnt), self.updates_at(steps))
        if not self.turns.others:
            return own
        parts = [(own, self.updates_at)]
        for name, turn in self.turns.others.items():
            networks = nn.ModuleList(getattr(self, network) for network in turn.trains)
            updates = partial(self.turns.updates, name)
            parts.append((turn.optimizer(networks, max(1, updates(steps))), updates))
        return taking_turns(parts)

    def optimizer_steps(self, updates: int) -> int:
        """Return how many steps of the optimiser so many updates of the student take."""
        return self.turns.steps(updates)

    @property
    def steps_a_cycle(self) -> int:
        """Steps of the optimiser for an update of the student, when all phases have begun."""
        return 1 + sum(turn.updates for turn in self.turns.others.values())

    def updates_at(self, step: int) -> int:
        """Return how many updates the student had before a step of the optimiser."""
        return self.turns.updates(STUDENT, step)

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
        name, update = self.turns.at(self.global_step)
        self.let_learn(name)
        turn = self.turns.updates(name, self.global_step)
        phase = Phase(update, self.updates_at(self.trainer.max_steps), turn)
        losses = self.methods[name](self.networks, batch, phase, generator)
        count = torch.tensor(len(batch.x_0), device=self.device)
        self.stop_if_not_finite(losses.total.detach(), batch_idx)
        self._window.add(losses, count)
        # Lightning divides by the length of the window; the global count does it instead.
        return losses.total * count * self.trainer.accumulate_grad_batches

    def on_after_backward(self) -> None:
        """Let all learn again: checkpoints and averages keep of a student what learns."""
        for parameters in self._learnt.values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn summed gradients into those of the mean over the window's samples; log that mean."""
        name, _ = self.turns.at(self.global_step)
        alone = name == STUDENT
        if alone and self.log_variance is not None and self.log_variance.line.weight.grad is None:
            raise UserError(
                "stages.<stage>.family.learnt_weighting=true: this method does not weight its loss "
                "by what is learnt; expected false"
            )
        images, means = self._window.close(optimizer, self.trainer.world_size)
        prefix = "train_" if alone else f"train_{name}_"
        self.log_dict({f"{prefix}{term}": mean for term, mean in means.items()}, batch_size=1)
        self.units_seen += images if alone else 0

    def configure_model(self) -> None:
        """Share what learns over the ranks where the strategy says so: it has new parameters."""
        super().configure_model()
        self._learnt = self._trained_by_phase()

    def _trained_by_phase(self) -> dict[str, list[nn.Parameter]]:
        found = {STUDENT: _trainable(self.student, self.log_variance)}
        return found | {n: self._trained_in(n, turn) for n, turn in self.turns.others.items()}

    def _trained_in(self, name: str, turn: Turn) -> list[nn.Parameter]:
        """Return what learns in a phase.

        Raises:
            UserError: for a network that is not there, and for nothing that learns.
        """
        key = f"stages.<stage>.family.phases.{name}.trains={list(turn.trains)}"
        for network in turn.trains:
            if network not in OTHERS:
                expected = f"expected some of {', '.join(OTHERS)}{did_you_mean(network, OTHERS)}"
                raise UserError(f"{key}: there is no {network}; {expected}")
            if getattr(self, network) is None:
                raise UserError(
                    f"{key}: stages.<stage>.family.{network}=null; expected one, as conf/{network} "
                    "has them, or a phase without it"
                )
        learnt = _trainable(*(getattr(self, network) for network in turn.trains))
        if not learnt:
            raise UserError(f"{key}: nothing in the phase learns; expected a network with weights")
        return learnt

    def let_learn(self, name: str) -> None:
        """Give gradients to the parameters of one phase, and to no other's."""
        for parameters in self._learnt.values():
            for parameter in parameters:
                parameter.requires_grad_(False)
        for parameter in self._learnt[name]:
            parameter.requires_grad_(True)

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """Sample as many as the batch has, alike every time, of its conditions."""
        if self.is_called_on(batch_idx):
            sampled = self.sampled(batch, generator_for(batch_idx))
            if self.is_own(batch_idx):
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


def _trainable(*networks: nn.Module | None) -> list[nn.Parameter]:
    """Return the parameters that learn."""
    found = [network.parameters() for network in networks if network is not None]
    return [p for parameters in found for p in parameters if p.requires_grad]


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
        return self.line(waves.to(self.line.weight.dtype)).sum(1)
