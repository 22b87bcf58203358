"""The stage `cache_encoder`: run an encoder once over a task's texts and keep what it says."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from hydra.utils import instantiate

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.encoders import EncoderData
from stillhouse.errors import UserError
from stillhouse.files import sha256_of
from stillhouse.ranges import Count, Positive
from stillhouse.records.encoders import EncoderBatch
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.kept_blocks import chosen_blocks
from stillhouse.students.layer_maps import KEY, LayerMap
from stillhouse.teachers.encoder_signals import EncoderIndex, Rows, encode, source_of, write_index
from stillhouse.teachers.encoders import LiveEncoder
from stillhouse.teachers.signals import rows_in, write_shard
from stillhouse.tracking.work import WorkProgress

SPLITS = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class CacheEncoder:
    """Write a frozen encoder's logits and layers of every text as shards, padding left out.

    A killed stage goes on behind its last whole shard. A signal of all texts serves fits on fewer
    labels as well.

    Attributes:
        teacher: `teachers.encoders.live_encoder`, partial.
        data: `EncoderData`, partial, called with (seed).
        splits: of `train`, `validation` and `test`, what is cached; a fit that validates reads
            `train` and `validation`.
        layer_map: the fit's; the teacher's layers that it names are kept. None: logits alone.
        student_layers: for the map, how many layers the fit's student has; or `student.blocks`, a
            fraction or indices, of one that is cut from the teacher. None: as many as the teacher.
        dtype: of hidden states, queries, keys and values.
        batches_per_shard: of `data.evaluation_batch_size` texts.
    """

    teacher: dict[str, Any]
    data: dict[str, Any]
    splits: Sequence[Split] = ("train", "validation")
    layer_map: dict[str, Any] | None = None
    student_layers: Count | Positive | list[int] | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    batches_per_shard: Count = 32

    def __call__(self, context: StageContext) -> StageResult:
        """Write the shards that are missing, then the index."""
        data: EncoderData = instantiate(self.data, _recursive_=False)(0)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        teacher: LiveEncoder = instantiate(self.teacher)(data).to(device)
        layers = self._layers(teacher)
        batches = self._batches(data, context.name)
        size = self.batches_per_shard
        shards = [batches[start : start + size] for start in range(0, len(batches), size)]

        folder = context.scratch / "shards"
        folder.mkdir(parents=True, exist_ok=True)
        table: list[dict[str, Any]] = []
        texts = sum(len(batch.input_ids) for batch in batches)
        with WorkProgress(context.name, texts, "texts", context.console) as progress:
            for number, shard in enumerate(shards):
                path = folder / f"shard-{number:05d}.safetensors"
                count = sum(len(batch.input_ids) for batch in shard)
                if rows_in(path) == count:
                    progress.skip(count)
                else:
                    write_shard(path, self._encode(teacher, shard, layers, progress), {})
                table.append({"file": path.name, "texts": count})

        for entry in table:
            (folder / entry["file"]).replace(context.output / entry["file"])
            entry["sha256"] = sha256_of(context.output / entry["file"])
        config: Any = teacher.config
        index = EncoderIndex(
            source=source_of(self.teacher["path"], data.tokenizer),
            hidden_layers=layers,
            attention_layers=[layer for layer in layers if layer],
            width=config.hidden_size,
            heads=config.num_attention_heads,
            shards=table,
        )
        write_index(context.output, index)
        stored = sum(path.stat().st_size for path in context.output.iterdir())
        tokens = sum(int(batch.attention_mask.sum()) for batch in batches)
        return StageResult(
            metrics={"texts": texts, "tokens": tokens, "bytes_per_text": stored / texts}
        )

    def _layers(self, teacher: LiveEncoder) -> list[int]:
        """Return the teacher's layers that the map names."""
        if self.layer_map is None:
            return []
        layer_map: LayerMap = instantiate(self.layer_map)
        config: Any = teacher.config
        depth: int = config.num_hidden_layers
        ours = depth if self.student_layers is None else self.student_layers
        if not isinstance(ours, int):
            ours = len(chosen_blocks(ours, depth))
        try:
            return sorted(set(layer_map(ours, depth).values()))
        except UserError as error:  # it speaks of a fit's map
            raise UserError(str(error).replace(KEY, "stages.<stage>.layer_map")) from error

    def _batches(self, data: EncoderData, stage: str) -> list[EncoderBatch]:
        """Return the texts of all splits."""
        key = f"stages.{stage}.splits={list(self.splits)}"
        if not self.splits or not set(self.splits) <= set(SPLITS):
            raise UserError(f"{key}: expected one or more of {', '.join(SPLITS)}")
        return [batch for split in self.splits for batch in data.evaluation_batches(split)]

    @torch.no_grad()
    def _encode(
        self,
        teacher: LiveEncoder,
        batches: Sequence[EncoderBatch],
        layers: Sequence[int],
        progress: WorkProgress,
    ) -> Rows:
        """Return the content of a shard."""
        device = next(teacher.parameters()).device
        blocks = [layer for layer in layers if layer]
        pieces: list[Rows] = []
        for batch in (batch.to(device) for batch in batches):
            output = teacher(batch, hidden_layers=layers, attention_layers=blocks)
            pieces.append(encode(output, batch, getattr(torch, self.dtype)))
            progress.advance(len(batch.input_ids))
        return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}
