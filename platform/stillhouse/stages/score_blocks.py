"""The stage `score_blocks`: what the blocks of a model do, on samples of the training data."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.errors import UserError
from stillhouse.evaluation.block_distances import block_scores
from stillhouse.ranges import Count
from stillhouse.records.block_scores import BlockScores, write_block_scores
from stillhouse.records.language import SequenceBatch
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.tracking.block_pictures import draw_distances
from stillhouse.tracking.work import WorkProgress


@dataclass(frozen=True, kw_only=True)
class ScoreBlocks:
    """Write how far every run of a model's blocks turns the residual stream, and draw it.

    A sample is a window of the training split: a stretch of text, or of a conversation. It is
    looked at its last token. Where there are fewer than asked for, all of them are taken.

    Attributes:
        path: the model, a folder or an id of the hub.
        data: LightningDataModule, partial, called with (seed); its tokenizer is the model's, its
            `evaluation_batch_size` counts the samples of a batch.
        max_samples: score on so many windows, spread evenly over the training split.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
        attn_implementation: attention of `transformers`.
    """

    path: str
    data: dict[str, Any]
    max_samples: Count
    dtype: str
    attn_implementation: str

    def __call__(self, context: StageContext) -> StageResult:
        """Measure; write `block_scores.json` and `distances.png`."""
        key = f"stages.{context.name}"
        data: LanguageData = instantiate(self.data, _recursive_=False)(0)
        check_same_tokenizer(self.path, data.tokenizer, key=key)
        samples = self._samples(data, key)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_causal_lm(
            self.path, dtype=self.dtype, attn_implementation=self.attn_implementation, key=key
        )
        with WorkProgress(context.name, len(samples), "samples", context.console) as progress:
            scores = block_scores(
                model.to(device).eval(),
                _batches(data, samples, progress),
                where=f"{key}.path={self.path}",
            )
        write_block_scores(scores, context.output)
        title = f"{scores.samples} samples, {scores.tokens} tokens"
        picture = draw_distances(scores.distances.tolist(), context.output / "distances.png", title)
        context.tracker.picture("distances", picture)
        context.tracker.table("least_distant_runs", ["n", "first_block", "distance"], _best(scores))
        return StageResult(
            metrics={
                "samples": scores.samples,
                "tokens": scores.tokens,
                "mean_block_influence": sum(scores.influences) / scores.blocks,
            }
        )

    def _samples(self, data: LanguageData, key: str) -> list[int]:
        """Return the windows to score on.

        Raises:
            UserError: when there is none.
        """
        number = len(data.windows("train"))
        if not number:
            raise UserError(
                f"{key}.data: the training split has no window; expected one sample at least"
            )
        wanted = min(self.max_samples, number)
        return [int(i * number / wanted) for i in range(wanted)]


def _batches(
    data: LanguageData, samples: Sequence[int], progress: WorkProgress
) -> Iterator[SequenceBatch]:
    """Yield the samples in batches; one is done when the next is asked for."""
    windows, size = data.windows("train"), data.evaluation_batch_size
    for start in range(0, len(samples), size):
        batch = [windows.window(index) for index in samples[start : start + size]]
        yield data.collate(batch)
        progress.advance(len(batch))


def _best(scores: BlockScores) -> list[list[float]]:
    """Return of every length that can go the least distant run: length, first block, distance."""
    starts = {n: scores.least_distant(n) for n in range(1, scores.blocks)}
    return [[n, start, float(scores.distances[start, n])] for n, start in starts.items()]
