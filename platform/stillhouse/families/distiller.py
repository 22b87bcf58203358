"""The base of every family: networks, optimiser, checkpoint contents and the guard against NaN.

What is common to all families is here once; the order of a training step is the family's own.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.families.strategies import FullyShardedStrategy
from stillhouse.sharding import (
    empty,
    filled,
    is_sharded,
    own_part,
    reshard,
    shard,
    whole_weights,
)

OptimizerBuilder = Callable[[nn.Module, int], OptimizerLRScheduler]


class Distiller(pl.LightningModule):
    """Owns a student that learns, a frozen teacher or none, and how they are kept.

    The teacher's tensors are in no optimiser and in no checkpoint: they are found by identity, so
    a student may carry a part of its teacher without confusing the two. A checkpoint also holds
    the state of every random generator of every rank, restored when training starts.

    Attributes:
        unit: what `units_seen` counts and the progress bar shows per second.
        units_seen: how much the student was trained on so far, by all ranks together.
        reads_inner_layers: whether a loss reads what no member of a network's lists hands on, such
            as queries and keys.
    """

    unit = "samples"
    reads_inner_layers = False

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        method: Callable[..., Any],
        optimizer: OptimizerBuilder,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = teacher
        self.method = method
        self.units_seen = 0
        self._batch_index = 0
        self._optimizer = optimizer
        self._generators: dict[str, Any] | None = None
        # In a tuple: as a submodule it would be materialised by the strategy.
        self._plain: tuple[nn.Module, ...] = ()
        # The teacher is not in the checkpoint, so a strict load would miss it.
        self.strict_loading = False

    def learning(self) -> list[nn.Module]:
        """Return the networks that learn, the student first."""
        return [self.student]

    def configure_model(self) -> None:
        """Share what learns over the ranks where the strategy says so, and the teacher, once."""
        strategy = self.trainer.strategy
        if not isinstance(strategy, FullyShardedStrategy) or self._plain:
            return
        self._plain = (empty(self.student),)
        networks = self.learning()
        if strategy.shard_teacher and self.teacher is not None:
            networks.append(self.teacher)
        mesh = strategy.device_mesh["data_parallel"]
        for network in networks:
            shard(network, mesh, let_go=not self.reads_inner_layers)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Gather weights as they are by now."""
        self._reshard()

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Gather weights as they are by now."""
        self._reshard()

    def _reshard(self) -> None:
        for network in (*self.learning(), self.teacher):
            if network is not None:
                reshard(network)

    def is_own(self, batch_idx: int) -> bool:
        """Return whether a validation batch is this rank's to measure."""
        return batch_idx % self.trainer.world_size == self.global_rank

    def is_called_on(self, batch_idx: int) -> bool:
        """Return whether this rank calls its networks on a validation batch.

        All do that share weights, and measure their own.
        """
        return self.is_own(batch_idx) or any(is_sharded(network) for network in self.learning())

    def gather(self) -> None:
        """Make the student whole again, on every rank, after training."""
        if is_sharded(self.student):
            self.student = filled(self._plain[0], whole_weights(self.student))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Build the optimiser over the student's trainable parameters."""
        return self._optimizer(self.student, self.trainer.max_steps)

    def optimizer_steps(self, updates: int) -> int:
        """Return how many steps of the optimiser so many updates of the student take."""
        return updates

    @property
    def steps_a_cycle(self) -> int:
        """Steps of the optimiser for an update of the student, in the long run."""
        return 1

    def updates_at(self, step: int) -> int:
        """Return how many updates the student had before a step of the optimiser."""
        return step

    def export(self, folder: Path, data: Any) -> None:
        """Write the student to `folder` as an ordinary model of its library.

        Args:
            folder: where to.
            data: the stage's data module, of the kind that the family trains on.
        """
        raise NotImplementedError

    def summary(self) -> Mapping[str, float | int]:
        """Return the final metrics of the stage, units in the names."""
        finals = {k: float(v) for k, v in self.trainer.callback_metrics.items()}
        updates = self.updates_at(self.trainer.global_step)
        return {"steps": updates, f"{self.unit}_seen": self.units_seen, **finals}

    def stop_if_not_finite(self, loss: Tensor, batch_index: int) -> None:
        """Stop before a loss that is NaN or infinite reaches the parameters.

        Raises:
            TrainingDiverged: naming the step and the batch.
        """
        self._batch_index = batch_index
        if not torch.isfinite(loss):
            raise TrainingDiverged(
                f"the loss is {loss.item()} at step {self.global_step}, batch {batch_index}; "
                "an earlier checkpoint, if there is one, is kept; lower "
                "optimizer.learning_rate, or clip with "
                "trainer.gradient_clip_val"
            )

    def stop_if_parameters_not_finite(self) -> None:
        """Keep and export no student that holds NaN or infinity.

        Raises:
            TrainingDiverged: naming the parameter, the step and the batch.
        """
        for name, parameter in self.student.named_parameters():
            if not torch.isfinite(own_part(parameter)).all():
                raise TrainingDiverged(
                    f"{name} is not finite any more at step {self.global_step}, batch "
                    f"{self._batch_index}; an earlier checkpoint, if there is one, is kept; lower "
                    "optimizer.learning_rate, or clip with trainer.gradient_clip_val"
                )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the teacher out, add the generators' states, refuse to keep NaN."""
        self.stop_if_parameters_not_finite()
        frozen = set() if self.teacher is None else {id(t) for t in tensors_of(self.teacher)}
        # What a student does not learn is there again when it is built again.
        frozen |= {id(p) for p in self.student.parameters() if not p.requires_grad}
        for name, tensor in self._named_tensors():
            if id(tensor) in frozen:
                checkpoint["state_dict"].pop(name, None)
        checkpoint["generators"] = self._of_every_rank(generator_states())
        checkpoint["units_seen"] = self.units_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the counters; the generators wait until training starts.

        Raises:
            UserError: when another number of ranks wrote the checkpoint. Its place in the data and
                its generators mean nothing to them.
        """
        before, now = len(checkpoint["generators"]), self.trainer.world_size
        if before != now:
            raise UserError(
                f"trainer.devices: the checkpoint of step {checkpoint['global_step']} was written "
                f"by {before} processes, this is a run of {now}; set trainer.devices={before} to "
                "go on from it, or begin the stage anew with force=<stage>"
            )
        self._generators = checkpoint["generators"][self.global_rank]
        self.units_seen = checkpoint["units_seen"]

    def on_train_start(self) -> None:
        """Restore the generators last, after everything that draws numbers while setting up."""
        if self._generators is not None:
            restore_generators(self._generators)
            self._generators = None
        elif self.trainer.world_size > 1:
            # One seed built equal networks; what ranks draw from here on must differ.
            seed_generators(torch.initial_seed(), self.global_rank)

    def _of_every_rank(self, value: Any) -> list[Any]:
        """Return the value that each rank calls this with, in the order of ranks."""
        values = [value] * self.trainer.world_size
        if self.trainer.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def _named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.named_parameters(remove_duplicate=False)
        yield from self.named_buffers(remove_duplicate=False)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Yield a module's parameters and buffers."""
    yield from module.parameters()
    yield from module.buffers()


def seed_generators(*numbers: int) -> None:
    """Seed Python's, NumPy's and torch's global generators; neighbouring numbers are unrelated."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def generator_states() -> dict[str, Any]:
    """Return the states of Python's, NumPy's and torch's global generators, as plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [
            str(name),
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_generators(states: dict[str, Any]) -> None:
    """Put back what `generator_states` returned."""
    random.setstate(states["python"])
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
