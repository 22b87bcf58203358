"""The stage `analyse`: how alike the layers of a model attend, on windows of the training data."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.errors import UserError
from stillhouse.evaluation.attention_similarity import attention_similarity
from stillhouse.ranges import Count
from stillhouse.records.similarity import Similarity, write_similarity
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.tracking.similarity_pictures import draw_scores, draw_similarity
from stillhouse.tracking.work import WorkProgress


@dataclass(frozen=True, kw_only=True)
class AnalyseAttention:
    """Write the similarity of the layers' attention matrices, and draw it.

    Only windows of exactly `data.sequence_length` tokens count, so that nothing is padded and every
    matrix is of one size. Where there are fewer than asked for, all of them are taken.

    Attributes:
        path: the model, a folder or an id of the hub.
        data: LightningDataModule, partial, called with (seed); its tokenizer is the model's.
        max_windows: compare on so many windows, spread evenly over the training split.
        dtype: torch dtype of the weights; `auto` keeps the stored one.
    """

    path: str
    data: dict[str, Any]
    max_windows: Count
    dtype: str

    def __call__(self, context: StageContext) -> StageResult:
        """Measure; write `similarity.json`, `similarity.png` and `scores.png`."""
        key = f"stages.{context.name}"
        data: LanguageData = instantiate(self.data, _recursive_=False)(0)
        check_same_tokenizer(self.path, data.tokenizer, key=key)
        windows = self._full_windows(data, key)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_causal_lm(
            self.path, dtype=self.dtype, attn_implementation="sdpa", key=key
        )
        with WorkProgress(context.name, len(windows), "windows", context.console) as progress:
            similarity = attention_similarity(
                model.to(device).eval(),
                _counted(windows, progress),
                where=f"{key}.path={self.path}",
            )
        write_similarity(similarity, context.output)
        _draw(similarity, context)
        return StageResult(
            metrics={
                "windows": similarity.windows,
                "tokens": similarity.tokens,
                "mean_similarity": sum(similarity.scores) / similarity.layers,
            }
        )

    def _full_windows(self, data: LanguageData, key: str) -> list[Tensor]:
        """Return the token ids of the windows to compare on, each [sequence_length].

        Raises:
            UserError: when none is long enough.
        """
        windows, length = data.windows("train"), data.sequence_length
        full = [i for i, (start, stop) in enumerate(windows.spans) if stop - start == length]
        if not full:
            raise UserError(
                f"{key}.data.sequence_length={length}: no training window has so many tokens; "
                "lower it, or set data.packing=true, so that windows run across documents"
            )
        wanted = min(self.max_windows, len(full))
        stride = len(full) / wanted
        return [windows.window(full[int(i * stride)]).input_ids for i in range(wanted)]


def _counted(windows: list[Tensor], progress: WorkProgress) -> Iterator[Tensor]:
    """Yield the windows; one is done when the next is asked for."""
    for window in windows:
        yield window
        progress.advance(1)


def _draw(similarity: Similarity, context: StageContext) -> None:
    title = f"{similarity.windows} windows, {similarity.tokens} tokens"
    pictures = {
        "similarity": draw_similarity(
            similarity.matrix.tolist(), context.output / "similarity.png", title
        ),
        "scores": draw_scores(
            similarity.scores, similarity.cut, context.output / "scores.png", title
        ),
    }
    for name, path in pictures.items():
        context.tracker.picture(name, path)
