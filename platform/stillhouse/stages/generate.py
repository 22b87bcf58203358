"""The stage `generate`: a model continues the prompts of the training windows in its own words."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from stillhouse.data.corpora.generated import PROVENANCE
from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer, tokenizer_identity
from stillhouse.data.windows import Window
from stillhouse.errors import UserError
from stillhouse.files import write_json
from stillhouse.ranges import Count
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.causal_lm import load_causal_lm
from stillhouse.teachers.decoding import Tokens
from stillhouse.teachers.sharded_decoding import BatchDecoder, decode_in_shards
from stillhouse.teachers.signals import model_provenance
from stillhouse.tracking.work import WorkProgress


@dataclass(frozen=True)
class Prompt:
    """The beginning of a training window.

    Attributes:
        window: its index.
        tokens: what the model is given.
        reference: what follows in the data.
    """

    window: int
    tokens: Tokens
    reference: Tokens


@dataclass(frozen=True, kw_only=True)
class Generate:
    """Write an Arrow data set of prompts and the model's continuations, with their provenance.

    A window all of whose tokens are learnt (plain text) is cut behind `prompt_tokens`; another one
    (a conversation) before its first learnt token. `teachers.sharded_decoding` says how a killed
    stage goes on.

    Attributes:
        path: the model, a folder or an id of the hub.
        dtype, attn_implementation: as in `teachers.live.live_teacher`.
        data: LightningDataModule, partial, called with (seed); its tokenizer is the model's.
        decoding: how continuations are drawn, partial, called with (model, prompts).
        prompt_tokens: tokens of a prompt.
        max_sequences: continue so many windows, spread evenly; null takes all.
        batch_size: prompts a batch.
        seed: of the draws.
    """

    path: str
    data: dict[str, Any]
    decoding: dict[str, Any]
    prompt_tokens: Count
    max_sequences: Count | None
    batch_size: Count
    seed: int
    dtype: str
    attn_implementation: str

    def __call__(self, context: StageContext) -> StageResult:
        """Generate the batches that are missing, then write the data set."""
        data: LanguageData = instantiate(self.data, _recursive_=False)(self.seed)
        check_same_tokenizer(self.path, data.tokenizer, key=f"stages.{context.name}")
        prompts = self._prompts(data, context.name)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = load_causal_lm(
            self.path,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            key=f"stages.{context.name}",
        )
        model = model.to(device).eval()
        decode = instantiate(self.decoding)
        with WorkProgress(context.name, len(prompts), "sequences", context.console) as progress:
            continuations, rate = decode_in_shards(
                BatchDecoder(model, decode, data.end_token, data.pad_token),
                prompts,
                batch_size=self.batch_size,
                seed=self.seed,
                folder=context.scratch / "shards",
                progress=progress,
            )
        pairs = zip(prompts, continuations, strict=True)
        rows = [_row(prompt, tokens, data) for prompt, tokens in pairs]
        self._write(context.output, rows, data)
        return StageResult(metrics={**_measures(rows, data), "tokens_per_s": rate})

    def _prompts(self, data: LanguageData, name: str) -> list[Prompt]:
        """Return the prompts in the order of the windows.

        Raises:
            UserError: when no window is longer than a prompt.
        """
        windows = data.windows("train")
        wanted = min(self.max_sequences or len(windows), len(windows))
        stride = len(windows) / max(1, wanted)
        chosen = [windows.window(int(i * stride)) for i in range(wanted)]
        prompts = [p for w in chosen if (p := _cut(w, self.prompt_tokens)) is not None]
        if not prompts:
            raise UserError(
                f"stages.{name}.prompt_tokens={self.prompt_tokens}: no training window is longer; "
                f"its length is data.sequence_length={data.sequence_length}"
            )
        return prompts

    def _write(self, folder: Path, rows: list[dict[str, Any]], data: LanguageData) -> None:
        from datasets import Dataset, disable_progress_bars

        disable_progress_bars()
        Dataset.from_list(rows).save_to_disk(folder)
        provenance = {
            **model_provenance(self.path),
            "tokenizer_sha256": tokenizer_identity(data.tokenizer),
            "windows_sha256": data.windows("train").identity(),
            "decoding": self.decoding,
            "prompt_tokens": self.prompt_tokens,
            "seed": self.seed,
        }
        write_json(folder / PROVENANCE, provenance)


def _cut(window: Window, prompt_tokens: Count) -> Prompt | None:
    """Cut a window into prompt and reference; None where nothing is left of it."""
    tokens = [*window.input_ids[:1].tolist(), *window.labels.tolist()]
    learned = window.learned.tolist()
    place = prompt_tokens if all(learned) else learned.index(True) + 1
    if place >= len(tokens):
        return None
    assert window.index is not None
    return Prompt(window.index, tokens[:place], tokens[place:])


def _row(prompt: Prompt, continuation: Tokens, data: LanguageData) -> dict[str, Any]:
    tokenizer = data.tokenizer
    return {
        "window": prompt.window,
        "prompt": tokenizer.decode(prompt.tokens),
        "completion": tokenizer.decode(continuation),
        "prompt_ids": prompt.tokens,
        "completion_ids": continuation,
    }


def _measures(rows: Sequence[dict[str, Any]], data: LanguageData) -> dict[str, float | int]:
    """Return how much was generated, and how much of it came to an end by itself."""
    tokens = sum(len(row["completion_ids"]) for row in rows)
    ended = sum(row["completion_ids"][-1] == data.end_token for row in rows)
    return {
        "sequences": len(rows),
        "completion_tokens": tokens,
        "ended_fraction": ended / len(rows),
    }
