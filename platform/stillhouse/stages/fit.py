"""The stage `fit`: train a student with a family and a method, and hand it on as a model folder."""

import warnings
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
from hydra.utils import instantiate
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from stillhouse.errors import UserError
from stillhouse.families.checkpoints import latest_checkpoint, step_of
from stillhouse.families.distiller import Distiller
from stillhouse.stages import ranks
from stillhouse.stages.reports import draw, heard
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.tracking.loggers import SeriesLogger
from stillhouse.tracking.progress import StageProgress

# What Lightning says of itself: advice that does not fit here (the teacher is in eval mode on
# purpose, loaders are ours, what is logged was reduced over the ranks before), and one warning of
# its own use of torch. So does torch.
LIGHTNING_CHATTER = (
    r".*module\(s\) in eval mode at the start of training.*",
    r".*isinstance\(treespec, LeafSpec\).*",
    r".*`tensorboardX` has been removed.*",
    r".*does not have many workers.*",
    r".*when logging on epoch level in distributed setting.*",
    # Of FSDP2: no dropout here draws from a sharded tensor, and no output is changed in place.
    r"DTensor random operators may not have complete support.*",
    r"FSDP2-wrapped module .* returned a view tensor.*",
)
# How Lightning says that data parallelism waits for gradients that do not come.
UNUSED = "parameters that were not used"


@runtime_checkable
class Placed(Protocol):
    """A callback that names its own keys in messages.

    Attributes:
        key: where it stands in the config.
    """

    key: str


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Train one student.

    Every node is built here, in this order and from one seed: data, student, teacher, method,
    family. Two stages with equal seed, data and student therefore start from equal parameters.

    Attributes:
        family: the LightningModule, partial: called with (student, teacher, method, optimizer).
        method: the loss, partial.
        teacher: partial, called with (data); None for methods that have no teacher.
        student: partial, called with (data).
        data: LightningDataModule, partial, called with (seed).
        optimizer: partial, called with (module, max_steps).
        trainer: `lightning.Trainer`, partial; logger and callbacks are added here.
        callbacks: further callbacks by name, the recipe's; None leaves one out.
        own_callbacks: those of this stage alone, alike.
        seed: decides initialisation, order and every other draw.
    """

    family: dict[str, Any]
    method: dict[str, Any]
    teacher: dict[str, Any] | None
    student: dict[str, Any]
    data: dict[str, Any]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]
    callbacks: dict[str, Any] = field(default_factory=dict)
    own_callbacks: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __call__(self, context: StageContext) -> StageResult:
        """Train, or go on from the last checkpoint in `context.scratch`; write the model folder."""
        pl.seed_everything(self.seed, verbose=False)
        data = instantiate(self.data, _recursive_=False)(self.seed)
        student = instantiate(self.student)(data)
        teacher = instantiate(self.teacher)(data) if self.teacher else None
        module: Distiller = instantiate(self.family)(
            student, teacher, instantiate(self.method), instantiate(self.optimizer)
        )
        sizes = {"student_parameters": number_of_parameters(student)}
        if teacher is not None:
            sizes["teacher_parameters"] = number_of_parameters(teacher)
        context.tracker.describe(sizes)
        # Before Lightning asks for it, so that the data's remarks are read before training.
        data.prepare_data()
        reports = dict(heard(context, [data]))
        progress = StageProgress(context.name, context.console)
        callbacks = self._callbacks(context.name)
        trainer = self._trainer(context, [progress, *callbacks], module)
        checkpoint = latest_checkpoint(context.scratch)
        for logger in context.tracker.loggers:
            if isinstance(logger, SeriesLogger):
                logger.drop_after(0 if checkpoint is None else step_of(checkpoint))
        with warnings.catch_warnings():
            for message in LIGHTNING_CHATTER:
                warnings.filterwarnings("ignore", message=message)
            with ranks.joined(self, context, trainer):
                try:
                    trainer.fit(
                        module,
                        datamodule=data,
                        ckpt_path=checkpoint,
                        weights_only=True,
                    )
                    module.gather()
                except SystemExit as stopped:  # what Lightning makes of Ctrl-C
                    raise KeyboardInterrupt from stopped
                except RuntimeError as error:
                    if UNUSED not in str(error):
                        raise
                    raise UserError(
                        f"stage {context.name}: trainer.strategy={self.trainer.get('strategy')}: "
                        "the loss leaves a part of the student unused; set "
                        "trainer.strategy=ddp_find_unused_parameters_true"
                    ) from error
        module.stop_if_parameters_not_finite()
        if trainer.is_global_zero:
            module.export(context.output, data)
            draw(context, callbacks)
        reports |= heard(context, callbacks)
        return StageResult(metrics={**sizes, **module.summary(), **reports})

    def _callbacks(self, stage: str) -> list[pl.Callback]:
        """Build the callbacks; those that name their keys learn where they stand."""
        nodes = self.callbacks | self.own_callbacks
        built = {name: instantiate(node) for name, node in nodes.items() if node is not None}
        for name, callback in built.items():
            if isinstance(callback, Placed):
                own = f"stages.{stage}.own_" if name in self.own_callbacks else ""
                callback.key = f"{own}callbacks.{name}"
        return list(built.values())

    def _trainer(
        self, context: StageContext, callbacks: list[pl.Callback], module: Distiller
    ) -> pl.Trainer:
        """Build the trainer; what the config says in the student's updates becomes steps.

        Raises:
            UserError: for a budget of no step.
        """
        in_steps = {"max_steps": module.optimizer_steps(max(0, self.trainer["max_steps"]))}
        interval = self.trainer.get("val_check_interval")
        if isinstance(interval, int):
            in_steps["val_check_interval"] = interval * module.steps_a_cycle
        trainer = make_trainer(
            context.name,
            self.trainer | in_steps,
            default_root_dir=context.scratch,
            logger=context.tracker.loggers or False,
            callbacks=callbacks,
            # Without a checkpoint callback of its own, Lightning would add one.
            enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks),
            enable_progress_bar=True,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
        )
        if trainer.max_steps < 1:
            raise UserError(
                f"stage {context.name}: trainer.max_steps={trainer.max_steps}: expected 1 or more"
            )
        return trainer


def make_trainer(stage: str, node: dict[str, Any], **further: Any) -> pl.Trainer:
    """Build the trainer of a stage from its node.

    Raises:
        UserError: for values that Lightning refuses, and for devices that are not there.
    """
    sharing = node.get("strategy")
    if isinstance(sharing, dict) and not isinstance(sharing["data_parallel_size"], int):
        raise UserError(
            f"stage {stage}: trainer.devices={node['devices']}: weights are shared over a number "
            "of processes; expected it, such as 2"
        )
    try:
        # A stage starts its ranks itself, whatever cluster started this process.
        trainer: pl.Trainer = instantiate(node)(plugins=LightningEnvironment(), **further)
    except (MisconfigurationException, TypeError, ValueError) as error:
        given = ", ".join(f"{k}={node.get(k)}" for k in ("accelerator", "devices"))
        raise UserError(
            f"stage {stage}: Lightning refuses its trainer ({given}): {error}"
        ) from error
    return trainer


def number_of_parameters(module: nn.Module) -> int:
    """Count parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())
