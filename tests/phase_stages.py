"""Networks of points that take turns, a loss that all are in, and a stage of several ranks."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from generators import POINTS, data_of, point_generator
from lightning.pytorch.plugins.environments import LightningEnvironment
from sharded_trainers import Sharing, strategy_of
from torch import Generator, Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from training import bare_trainer

from stillhouse.families.optimizers import adamw
from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.turns import Turn
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms
from stillhouse.sharding import whole_weights
from stillhouse.stages import ranks
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.discriminators import mlp_head, on_features
from stillhouse.teachers.fake_scores import full_copy

ADAM = partial(adamw, learning_rate=0.01, weight_decay=0.1)
HEADS = partial(on_features, features=["network.model.layers.0"], head=partial(mlp_head, hidden=4))
# What two updates of the student and theirs of the others are, and what learns in each.
CYCLES = ("student", "critic", "critic", "student", "critic", "critic", "judge")
LEARNT = {
    "student": {"student", "log_variance"},
    "critic": {"fake_score"},
    "judge": {"discriminator"},
}
NETWORKS = ("student", "log_variance", "fake_score", "discriminator", "teacher")


def everything(
    networks: Networks, batch: ImageBatch, phase: Phase, generator: Generator
) -> LossTerms:
    """A loss without randomness of all networks: only whose turn it is decides what learns."""
    assert networks.log_variance is not None
    assert networks.discriminator is not None
    x, t, said = batch.x_0, torch.full((len(batch.x_0),), 0.8).double(), batch.condition
    outputs = [network(x, t, said) for network in (networks.student, networks.fake_score)]
    outputs.append(networks.discriminator(networks.fake_score, x, t, said))
    errors = sum((y - 1).square().flatten(1).mean(1) for y in outputs)
    losses = errors + (networks.log_variance(t) - 1).square()
    return LossTerms(losses.mean(), {"size": x.abs().mean()})


def without_the_student(
    networks: Networks, batch: ImageBatch, phase: Phase, generator: Generator
) -> LossTerms:
    """The same of a student that is asked without a gradient alone, as samples are taken."""
    student: Any = networks.student

    def sampled(*asked: Any) -> Tensor:
        with torch.no_grad():
            return student(*asked)

    return everything(replace(networks, student=sampled), batch, phase, generator)


def descent(module: nn.Module, max_steps: int) -> Any:
    """A step of rate 1 without state, with the schedule that phases ask for."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, lambda _: 1.0)},
    }


def taking_turns_by(
    method: Any = everything, optimizer: Any = ADAM, **changes: Any
) -> TimestepDistiller:
    """Return a module of three phases: the third begins a cycle late."""
    phases = {
        "critic": Turn(trains=["fake_score"], updates=2, from_update=0, optimizer=optimizer),
        "judge": Turn(trains=["discriminator"], updates=1, from_update=1, optimizer=optimizer),
    }
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "times": {"1": [1.5708]},
        "guidance_scale": 1.0,
        "takes_tangents": False,
        "learnt_weighting": True,
        "phases": phases,
        "fake_score": full_copy,
        "discriminator": HEADS,
        "teacher": point_generator(seed=5).requires_grad_(False),
    } | changes
    teacher = settings.pop("teacher")
    if callable(method):
        method = dict.fromkeys(["student", *settings["phases"]], method)
    return TimestepDistiller(point_generator(), teacher, method, optimizer, **settings)


def parts_of(module: TimestepDistiller) -> dict[str, dict[str, Tensor]]:
    """Return a copy of the state of every network."""
    found = {name: getattr(module, name) for name in NETWORKS}
    return {n: copy.deepcopy(whole_weights(m)) for n, m in found.items() if m is not None}


class Watch(pl.Callback):
    """Notes all networks behind every step of the optimiser, or behind the last one alone.

    Networks that ranks have parts of are shared anew where they are read, which hides what a step
    leaves behind.
    """

    def __init__(self, *, last: bool = False) -> None:
        self.last = last
        self.seen: list[dict[str, dict[str, Tensor]]] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.seen.append(parts_of(pl_module))

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self.last and trainer.global_step < trainer.max_steps:
            return
        if self.last or trainer.global_step == len(self.seen):
            self.seen.append(parts_of(pl_module))


def trained_by_ranks(
    stage: Any, context: StageContext, module: TimestepDistiller, watch: Watch, max_steps: int
) -> StageResult:
    """Train a stage's module on batches of eight points by its ranks, and leave what each saw."""
    trainer = bare_trainer(
        context.scratch,
        devices=stage.devices,
        strategy=strategy_of(stage.devices, stage.sharing, ddp="ddp_find_unused_parameters_true"),
        max_steps=max_steps,
        limit_val_batches=0,
        gradient_clip_val=0.1,
        use_distributed_sampler=False,
        plugins=LightningEnvironment(),
        callbacks=[watch],
    )
    with ranks.joined(stage, context, trainer):
        trainer.fit(module, datamodule=data_of(POINTS, batch_size=8 // stage.devices))
    torch.save(watch.seen, context.output / f"seen_{trainer.global_rank}.pt")
    return StageResult(metrics=module.summary())


@dataclass(frozen=True, kw_only=True)
class TwoCycles:
    """`CYCLES` on batches of eight points, by ranks that share them.

    Attributes:
        devices: ranks.
        sharing: what else they share.
    """

    devices: int
    sharing: Sharing = Sharing.NOTHING

    def __call__(self, context: StageContext) -> StageResult:
        """Train; leave what every rank had behind every step."""
        losses = {"student": everything, "critic": without_the_student}
        losses["judge"] = without_the_student
        module = taking_turns_by(losses, optimizer=descent)
        watch = Watch(last=self.sharing is not Sharing.NOTHING)
        return trained_by_ranks(self, context, module, watch, len(CYCLES))
