"""Stages, methods and models that tests of several ranks run in other processes, hence by name."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from sharded_trainers import Sharing, strategy_of
from training import bare_trainer, plain_sgd

from stillhouse.data.language import KeptBatches
from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.families.sequence.module import SequenceDistiller
from stillhouse.families.sequence.word_kd import word_kd
from stillhouse.records.language import LanguageOutput, LanguageSignal, SequenceBatch
from stillhouse.records.losses import LossTerms
from stillhouse.sharding import whole
from stillhouse.stages import ranks
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import sharing_of
from stillhouse.teachers.live import LiveTeacher

# As unequal over two ranks as within one.
DOCUMENTS = ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [5], [8, 9, 7, 9, 3, 2], [3, 8])
method = partial(word_kd, temperature=2.0, cross_entropy_weight=0.25)


def tiny_gpt2(seed: int) -> Any:
    """Return a random GPT-2 in float64, all of it: Llama's norms compute in float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=23,
        n_positions=16,
        n_embd=16,
        n_layer=2,
        n_head=2,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double()


def tiny_sharer(seed: int) -> Any:
    """Return a random Llama in float64, two of its three blocks with the first one's attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=23,
        max_position_embeddings=16,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.4,
        bos_token_id=0,
        eos_token_id=0,
    )
    full = LlamaForCausalLM(config).double()
    return share_attention(full, sharing_of([1, 2], 3, key="followers"), where="").double()


def batch_of(document: list[int]) -> SequenceBatch:
    """Return a document and its end as a batch of one row."""
    ids, labels = torch.tensor([document]), torch.tensor([[*document[1:], 0]])
    return SequenceBatch(ids, labels, torch.ones_like(ids, dtype=torch.bool))


def rank() -> int:
    """Return the rank of this process."""
    return int(os.environ.get("LOCAL_RANK", 0))


@dataclass(frozen=True, kw_only=True)
class OneStep:
    """One optimiser step over all of `DOCUMENTS`, each a micro-batch; it fails where it is told.

    Attributes:
        devices: ranks that share the documents.
        sharing: what else they share.
        student: makes it from a seed.
        fault: what goes wrong on rank 1, if anything.
    """

    devices: int = 2
    sharing: Sharing = Sharing.NOTHING
    student: Callable[[int], Any] = tiny_gpt2
    fault: Literal["at the start", "diverged", "killed", "a fault of ours"] | None = None

    def __call__(self, context: StageContext) -> StageResult:
        """Train; leave the update, what was logged and a random number of every rank."""
        if self.fault == "at the start" and rank() == 1:
            raise TrainingDiverged("it never began")
        teacher = LiveTeacher(tiny_gpt2(2))
        module = SequenceDistiller(self.student(1), teacher, self._method, plain_sgd).train()
        before = [p.detach().clone() for p in module.student.parameters()]
        trainer = bare_trainer(
            context.scratch,
            devices=self.devices,
            strategy=strategy_of(self.devices, self.sharing),
            max_steps=1,
            accumulate_grad_batches=len(DOCUMENTS) // self.devices,
            val_check_interval=len(DOCUMENTS) // self.devices,
            use_distributed_sampler=False,
            plugins=LightningEnvironment(),
        )
        batches = [batch_of(d) for d in DOCUMENTS]
        with ranks.joined(self, context, trainer):
            own = batches[trainer.global_rank :: self.devices]
            trainer.fit(module, KeptBatches(own), KeptBatches(batches[:3]))
            after = [whole(p.detach()) for p in module.student.parameters()]
        update = torch.cat([(b - a).flatten() for b, a in zip(before, after, strict=True)])
        torch.save(update.detach(), context.output / f"update_{trainer.global_rank}.pt")
        torch.save(torch.rand(4), context.output / f"draw_{trainer.global_rank}.pt")
        return StageResult(metrics=module.summary())

    def _method(
        self, student: LanguageOutput, teacher_signal: LanguageSignal, batch: SequenceBatch
    ) -> LossTerms:
        if rank() == 1 and self.fault == "diverged":
            raise TrainingDiverged("the loss is nan at step 0")
        if rank() == 1 and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank() == 1 and self.fault == "a fault of ours":
            raise ZeroDivisionError("division by zero")
        return method(student, teacher_signal, batch)


def nan_on_rank_one(
    student: LanguageOutput, signal: LanguageSignal, batch: SequenceBatch, **options: Any
) -> LossTerms:
    """A loss that is NaN on one rank only."""
    return LossTerms(
        total=word_kd(student, signal, batch, **options).total * (torch.nan if rank() else 1.0)
    )


def rank_zero_hears_nothing(
    student: LanguageOutput, signal: LanguageSignal, batch: SequenceBatch, **options: Any
) -> LossTerms:
    """Rank 1 fails while rank 0 is where it cannot hear of it, as in a collective of NCCL."""
    if rank() == 1:
        raise UserError("rank 1 has had enough")
    time.sleep(600)
    raise AssertionError("rank 0 was left waiting")
