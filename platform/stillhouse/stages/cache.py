"""The stage `cache`: run the teacher once over the training windows and keep its signal."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from stillhouse.data.language import LanguageData
from stillhouse.files import sha256_of
from stillhouse.objectives.divergences import forward_kl
from stillhouse.objectives.tokens import log_probs
from stillhouse.ranges import Count
from stillhouse.records.language import LanguageOutput, LanguageSignal, SequenceBatch
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.causal_lm import vocabulary_head
from stillhouse.teachers.codecs import Codec, Rows
from stillhouse.teachers.live import LiveTeacher
from stillhouse.teachers.signals import (
    Index,
    facts_in,
    refuse_shifted_windows,
    rows_in,
    source_of,
    write_head,
    write_index,
    write_shard,
)
from stillhouse.tracking.work import WorkProgress


@dataclass(frozen=True, kw_only=True)
class CacheSignal:
    """Write a teacher's signal on every training window as shards.

    Only the positions that are learnt are kept. A killed stage goes on behind its last whole shard.

    Attributes:
        teacher: `teachers.live.live_teacher`, partial; its `layers` are kept besides.
        data: LightningDataModule, partial, called with (seed); its windows must not be shifted.
        codec: how the signal is stored.
        windows_per_shard: windows of a file.
    """

    teacher: dict[str, Any]
    data: dict[str, Any]
    codec: dict[str, Any]
    windows_per_shard: Count

    def __call__(self, context: StageContext) -> StageResult:
        """Write the shards that are missing, then the index."""
        data: LanguageData = instantiate(self.data, _recursive_=False)(0)
        refuse_shifted_windows(data)
        codec: Codec = instantiate(self.codec)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher: LiveTeacher = instantiate(self.teacher)(data).to(device)
        source = source_of(self.teacher["path"], data, codec)
        head = vocabulary_head(teacher.model)
        codec.check(head.weight.shape[0])
        lengths = data.windows("train").learned_lengths()
        size = self.windows_per_shard
        shards = [lengths[start : start + size] for start in range(0, len(lengths), size)]

        folder = context.scratch / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        table: list[dict[str, Any]] = []
        with WorkProgress(context.name, sum(lengths), "tokens", context.console) as progress:
            for number, shard in enumerate(shards):
                path = folder / f"shard-{number:05d}.safetensors"
                if rows_in(path) == sum(shard):
                    progress.skip(sum(shard))
                else:
                    span = range(number * size, number * size + len(shard))
                    batches = data.training_batches(span)
                    # A shard has its own draws, whichever attempt writes it.
                    draws = torch.Generator(device).manual_seed(number)
                    rows, facts = _encode(teacher, codec, batches, draws, progress)
                    write_shard(path, rows, facts)
                table.append({"file": path.name, "windows": len(shard), "rows": sum(shard)})

        kl = sum(float(facts_in(folder / s["file"])["kl"]) for s in table)
        for entry in table:
            (folder / entry["file"]).replace(context.output / entry["file"])
            entry["sha256"] = sha256_of(context.output / entry["file"])
        if codec.keeps_head:
            write_head(context.output, head)
        index = Index(
            source=source,
            teacher_path=self.teacher["path"],
            vocabulary_size=head.weight.shape[0],
            layers=list(teacher.layers),
            shards=table,
        )
        write_index(context.output, index)
        stored = sum(path.stat().st_size for path in context.output.iterdir())
        return StageResult(
            metrics={
                "tokens": sum(lengths),
                "bytes_per_token": stored / sum(lengths),
                "kl_to_dense": kl / sum(lengths),
            }
        )


@torch.no_grad()
def _encode(
    teacher: LiveTeacher,
    codec: Codec,
    batches: Iterable[SequenceBatch],
    draws: torch.Generator,
    progress: WorkProgress,
) -> tuple[Rows, dict[str, str]]:
    """Return the rows of a shard, and the sum of KL(dense, stored) over them."""
    device = draws.device
    pieces: list[Rows] = []
    kl = 0.0
    for batch in batches:
        output = teacher(batch.to(device)).at(batch.mask.to(device))
        rows = {name: tensor.cpu() for name, tensor in codec.encode(output, draws).items()}
        stored = codec.decode(rows, output.vocabulary_size, output.head)
        kl += float(forward_kl(dense(stored, device), log_probs(output.logits)).double().sum())
        pieces.append(rows)
        progress.advance(len(output.hidden_states))
    return {n: torch.cat([p[n] for p in pieces]) for n in pieces[0]}, {"kl": repr(kl)}


def dense(signal: LanguageSignal, device: torch.device) -> Tensor:
    """Return log-probabilities [n, V]; a residual is spread evenly over the tokens left out."""
    if isinstance(signal, LanguageOutput):
        head, states = signal.head, signal.hidden_states.to(device)
        return log_probs(head(states.to(head.weight.dtype)))
    left_out = signal.vocabulary_size - signal.token_ids.shape[-1]
    even = (signal.log_residual - math.log(max(1, left_out))).unsqueeze(-1)
    spread = even.expand(-1, signal.vocabulary_size)
    return spread.scatter(-1, signal.token_ids, signal.log_probs).log_softmax(-1).to(device)
