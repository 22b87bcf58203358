"""Decoding: how a teacher's own sequences are drawn from it, as `conf/decoding/*.yaml` names it.

Every function takes (model, prompts) and returns a continuation for each prompt, the end token
included where it came.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from stillhouse.evaluation.bleu import sentence_bleu
from stillhouse.ranges import Count, Finite, Positive, Share

Tokens = list[int]


@dataclass(frozen=True)
class Prompts:
    """Prompts of a batch.

    Attributes:
        input_ids: [B, T], padded on the left.
        attention_mask: [B, T]; True at real tokens.
        references: what follows each prompt in the data.
        end_token: ends a continuation.
        pad_token: fills what is padded.
    """

    input_ids: Int[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"]
    references: Sequence[Tokens]
    end_token: int
    pad_token: int


def greedy(model: PreTrainedModel, prompts: Prompts, *, max_new_tokens: Count) -> list[Tokens]:
    """Take the likeliest token at every position."""
    return _generate(model, prompts, max_new_tokens=max_new_tokens)


def sampled(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    max_new_tokens: Count,
    temperature: Positive,
    top_p: Share,
) -> list[Tokens]:
    """Draw from the model's distribution; torch's global generator decides.

    Args:
        model: the teacher.
        prompts: the prompts.
        max_new_tokens: longest continuation.
        temperature: of the distribution; 1 is the model's own.
        top_p: draws from the likeliest tokens that hold this mass; 1 takes all.
    """
    return _generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_p=top_p,
        top_k=0,
    )


def beam(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    max_new_tokens: Count,
    num_beams: Count,
    length_penalty: Finite,
) -> list[Tokens]:
    """Take the best entry of a beam search: the approximate mode, Kim & Rush's Seq-KD."""
    return _generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        length_penalty=length_penalty,
    )


def nearest_in_beam(
    model: PreTrainedModel,
    prompts: Prompts,
    *,
    max_new_tokens: Count,
    num_beams: Count,
    length_penalty: Finite,
) -> list[Tokens]:
    """Take the beam's entry that is nearest to the reference: Kim & Rush's Seq-Inter.

    Nearness is sentence BLEU over tokens (`evaluation.bleu`); of equally near entries the likelier
    one is taken.
    """
    entries = _generate(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        length_penalty=length_penalty,
    )
    return [
        max(
            entries[row * num_beams : (row + 1) * num_beams],
            key=lambda entry: sentence_bleu(entry, reference),
        )
        for row, reference in enumerate(prompts.references)
    ]


@torch.no_grad()
def _generate(model: PreTrainedModel, prompts: Prompts, **settings: Any) -> list[Tokens]:
    # Settings that ship with a model must not creep in: everything is said here.
    config = GenerationConfig(
        eos_token_id=prompts.end_token, pad_token_id=prompts.pad_token, **settings
    )
    generator: Any = model
    output = generator.generate(
        prompts.input_ids.to(model.device),
        attention_mask=prompts.attention_mask.long().to(model.device),
        generation_config=config,
    )
    rows = output[:, prompts.input_ids.shape[1] :].tolist()
    return [_until_end(row, prompts.end_token) for row in rows]


def _until_end(row: Tokens, end_token: int) -> Tokens:
    """Cut what pads a row behind its first end token."""
    return row[: row.index(end_token) + 1] if end_token in row else row
