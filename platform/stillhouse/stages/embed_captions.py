"""The stage `embed_captions`: every caption of a source, read once by a text encoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from stillhouse.data.pictures.captions import TEXT_ENCODER, TOKENIZER, Captions
from stillhouse.data.pictures.pictures import Pictures
from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.errors import UserError
from stillhouse.ranges import Count
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.few_step_pipeline import embedded
from stillhouse.students.text_encoders import load_text_encoder
from stillhouse.tracking.work import WorkProgress


@dataclass(frozen=True, kw_only=True)
class EmbedCaptions:
    """Write the states of every token of every caption, and the encoder that they are of.

    Attributes:
        source: node of a function that returns `Pictures` with captions.
        path: the encoder, a folder of `transformers` or an id of the hub.
        subfolder, tokenizer_subfolder: where the two lie in a whole pipeline, such as
            `text_encoder` and `tokenizer`; null for the folder itself.
        revision: of the hub; null for the newest.
        max_tokens: of a caption; longer ones are cut.
        batch_size: captions at a time.
    """

    source: dict[str, Any]
    path: str
    subfolder: str | None = None
    tokenizer_subfolder: str | None = None
    revision: str | None = None
    max_tokens: Count
    batch_size: Count

    def __call__(self, context: StageContext) -> StageResult:
        """Embed all splits' captions."""
        key = f"stages.{context.name}"
        texts = _captions(instantiate(self.source), key)
        version = {"revision": self.revision}
        tokenizer = load_tokenizer(
            self.path, subfolder=self.tokenizer_subfolder, key=f"{key}.path", **version
        )
        encoder = load_text_encoder(self.path, subfolder=self.subfolder, key=key, **version)
        most = getattr(encoder.config, "max_position_embeddings", None)
        if most is not None and self.max_tokens > most:
            raise UserError(
                f"{key}.max_tokens={self.max_tokens}: the encoder of {key}.path={self.path} reads "
                f"{most} at most"
            )
        tokenizer.model_max_length = self.max_tokens
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        encoder = encoder.to(device)
        states: list[Tensor] = []
        with WorkProgress(context.name, len(texts), "captions", context.console) as progress:
            for start in range(0, len(texts), self.batch_size):
                some = texts[start : start + self.batch_size]
                found, mask = embedded(tokenizer, encoder, some)
                states += [row[seen].cpu() for row, seen in zip(found, mask, strict=True)]
                progress.advance(len(some))
        ends = torch.tensor([len(state) for state in states]).cumsum(0)
        captions = Captions(context.output, texts, torch.cat(states), ends)
        captions.write()
        encoder.to("cpu").save_pretrained(context.output / TEXT_ENCODER)
        tokenizer.save_pretrained(context.output / TOKENIZER)
        return StageResult(
            metrics={"captions": len(texts), "longest": captions.longest, "width": captions.width}
        )


def _captions(source: Pictures, key: str) -> Sequence[str]:
    """Return each caption once, and the empty one, in alphabetical order.

    Raises:
        UserError: for a source without captions.
    """
    found: set[str] = set()
    for split, samples in source.splits.items():
        if samples.captions is None:
            raise UserError(
                f"{key}.source: the pictures of {source.name} for {split} have no captions; "
                "expected data=emoji, or pictures with a caption each"
            )
        found |= set(samples.captions)
    return sorted(found | {""})
