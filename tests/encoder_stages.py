"""A stage of the family `progressive` that tests of several ranks run in other processes."""

from dataclasses import dataclass
from functools import partial

import torch
from encoders import make, make_batch
from lightning.pytorch.plugins.environments import LightningEnvironment
from sharded_trainers import Sharing, strategy_of
from torch import nn
from training import bare_trainer, plain_sgd

from stillhouse.data.language import KeptBatches
from stillhouse.families.progressive.ernie_tiny import ernie_tiny, relation
from stillhouse.families.progressive.module import ProgressiveDistiller
from stillhouse.sharding import whole
from stillhouse.stages import ranks
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.layer_maps import uniform
from stillhouse.teachers.encoders import LiveEncoder

# As unequal over two ranks as within one.
BATCHES = [
    make_batch(lengths, seed=seed, labels=torch.arange(len(lengths)) % 2)
    for seed, lengths in enumerate([(7, 4, 9, 5, 6), (3,), (8, 5), (4,)])
]


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """One optimiser step over all of `BATCHES`, and a validation by the first three after it.

    Attributes:
        devices: ranks that share the batches.
        sharing: what else they share.
        projection: whether what is compared is multiplied by learnt matrices.
    """

    devices: int
    sharing: Sharing = Sharing.NOTHING
    projection: bool = False

    def __call__(self, context: StageContext) -> StageResult:
        """Train; leave the update of every rank."""
        module = ProgressiveDistiller(
            make("bert", seed=1),
            LiveEncoder(make("bert", seed=2)),
            partial(ernie_tiny, latent_loss=partial(relation, relation_heads=4)),
            plain_sgd,
            layer_map=uniform,
            projection=self.projection,
        ).double()
        learnt = nn.ModuleList(module.learning())
        before = [p.detach().clone() for p in learnt.parameters()]
        trainer = bare_trainer(
            context.scratch,
            devices=self.devices,
            strategy=strategy_of(self.devices, self.sharing),
            max_steps=1,
            accumulate_grad_batches=len(BATCHES) // self.devices,
            val_check_interval=len(BATCHES) // self.devices,
            use_distributed_sampler=False,
            plugins=LightningEnvironment(),
        )
        with ranks.joined(self, context, trainer):
            own = BATCHES[trainer.global_rank :: self.devices]
            trainer.fit(module, KeptBatches(own), KeptBatches(BATCHES[:3]))
            after = [whole(p.detach()) for p in nn.ModuleList(module.learning()).parameters()]
        update = torch.cat([(b - a).flatten() for b, a in zip(before, after, strict=True)])
        torch.save(update.detach(), context.output / f"update_{trainer.global_rank}.pt")
        return StageResult(metrics=module.summary())
