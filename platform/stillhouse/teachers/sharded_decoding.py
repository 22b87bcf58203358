"""Decoding of many prompts: sorted by length, in batches, each with its own seed and file.

A batch of prompts of one length is padded little. A killed stage goes on behind its last whole
batch, and its draws are those of an uninterrupted one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedModel

from stillhouse.data.stream import generator_for
from stillhouse.files import write_json
from stillhouse.teachers.decoding import Prompts, Tokens
from stillhouse.tracking.work import WorkProgress


class Asked(Protocol):
    """What a model is given, and what follows in the data."""

    @property
    def tokens(self) -> Tokens:
        """The prompt."""
        ...

    @property
    def reference(self) -> Tokens:
        """What follows it in the data."""
        ...


@dataclass(frozen=True)
class BatchDecoder:
    """Continues a batch of prompts.

    Attributes:
        model: the model, in eval mode.
        decode: one of `teachers.decoding`, called with (model, prompts).
        end_token: ends a continuation.
        pad_token: fills what is padded.
    """

    model: PreTrainedModel
    decode: Callable[[PreTrainedModel, Prompts], list[Tokens]]
    end_token: int
    pad_token: int

    def __call__(self, batch: Sequence[Asked]) -> list[Tokens]:
        """Return a continuation of every prompt; torch's global generator decides its draws."""
        longest = max(len(p.tokens) for p in batch)
        ids = [[self.pad_token] * (longest - len(p.tokens)) + p.tokens for p in batch]
        real = [[False] * (longest - len(p.tokens)) + [True] * len(p.tokens) for p in batch]
        prompts = Prompts(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(real),
            references=[p.reference for p in batch],
            end_token=self.end_token,
            pad_token=self.pad_token,
        )
        return self.decode(self.model, prompts)


def batches_by_length(prompts: Sequence[Asked], batch_size: int) -> list[list[int]]:
    """Return the indices of the prompts in batches, the shortest first."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def decode_in_shards(
    decoder: BatchDecoder,
    prompts: Sequence[Asked],
    *,
    batch_size: int,
    seed: int,
    folder: Path,
    progress: WorkProgress,
) -> tuple[list[Tokens], float]:
    """Continue the prompts whose batches are not in the folder yet.

    Args:
        decoder: continues a batch.
        prompts: in any order.
        batch_size: prompts a batch.
        seed: of the draws.
        folder: of the files, one a batch.
        progress: counts the prompts.

    Returns:
        A continuation of every prompt, in their order, and how many tokens were generated a second.
    """
    folder.mkdir(parents=True, exist_ok=True)
    continuations: list[Tokens] = [[] for _ in prompts]
    written, rate = 0, 0.0
    for number, indices in enumerate(batches_by_length(prompts, batch_size)):
        path = folder / f"part-{number:05d}.json"
        done = _read_part(path, len(indices))
        if done is not None:
            progress.skip(len(indices))
        else:
            with torch.random.fork_rng():
                torch.manual_seed(generator_for(seed, number).initial_seed())
                done = decoder([prompts[i] for i in indices])
            write_json(path, done)
            written += sum(map(len, done))
            progress.advance(len(indices))
            rate = written / progress.seconds()
            progress.note(f"{rate:.0f} tokens/s")
        for i, continuation in zip(indices, done, strict=True):
            continuations[i] = continuation
    return continuations, rate


def _read_part(path: Path, size: int) -> list[Tokens] | None:
    """Return the continuations that an earlier attempt wrote for a batch, if they are whole."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if len(content) == size else None
