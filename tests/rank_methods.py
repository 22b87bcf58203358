"""Recipes' methods on points, as a stage of several ranks that draw what one process would."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from commands import ROOT
from hydra.utils import instantiate
from omegaconf import OmegaConf
from phase_stages import HEADS, Watch, descent, taking_turns_by, trained_by_ranks
from sharded_trainers import Sharing
from torch import Generator

from stillhouse.config import preflight
from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.families.timestep.turns import Turn
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms
from stillhouse.schema import register_schemas
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.stages.workspace import register_resolvers
from stillhouse.teachers.fake_scores import full_copy

# What a rank has of a batch of eight points.
SIZE = 4


def method_of(recipe: str) -> Any:
    """Return the method of a recipe, one loss or one of each phase."""
    register_schemas()
    register_resolvers()
    config = preflight.compose_job([f"experiment={recipe}"], ROOT / "conf")
    node = OmegaConf.to_container(config.method, resolve=True)
    return instantiate(node, _convert_="all")


def by_parts(
    loss: Callable[..., LossTerms],
    networks: Networks,
    batch: ImageBatch,
    phase: Phase,
    generator: Generator,
) -> LossTerms:
    """Return the mean loss of parts of a batch, each with the draws of the rank that has it."""
    del generator
    first = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    losses = []
    for part, places in enumerate(torch.arange(len(batch.x_0)).split(SIZE)):
        own = ImageBatch(batch.x_0[places], batch.condition.picked(places))
        draws = Generator().manual_seed(100 * phase.turn + first + part)
        losses.append(loss(networks, own, phase, draws))
    terms = {name: torch.stack([p.terms[name] for p in losses]).mean() for name in losses[0].terms}
    return LossTerms(torch.stack([part.total for part in losses]).mean(), terms)


@dataclass(frozen=True, kw_only=True)
class SomeUpdates:
    """Two updates of the student by a recipe's method, on batches of eight points.

    Attributes:
        recipe: `scm` or `dmd2`.
        devices: ranks that share a batch.
        sharing: what else they share.
    """

    recipe: str
    devices: int
    sharing: Sharing = Sharing.NOTHING

    def __call__(self, context: StageContext) -> StageResult:
        """Train; leave what every rank had before and behind."""
        module = self._module()
        steps = 2 * module.steps_a_cycle
        return trained_by_ranks(self, context, module, Watch(last=True), steps)

    def _module(self) -> TimestepDistiller:
        method = method_of(self.recipe)
        if not isinstance(method, dict):
            return taking_turns_by(
                {"student": partial(by_parts, method)},
                descent,
                phases={},
                fake_score=None,
                discriminator=None,
                takes_tangents=True,
                learnt_weighting=False,
            )
        learns = ["fake_score", "discriminator"]
        return taking_turns_by(
            {name: partial(by_parts, loss) for name, loss in method.items()},
            descent,
            phases={"critic": Turn(trains=learns, updates=2, from_update=0, optimizer=descent)},
            fake_score=full_copy,
            discriminator=HEADS,
            learnt_weighting=False,
        )
