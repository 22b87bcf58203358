"""The evaluation of language models, as `conf/evaluation/language.yaml` names it."""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from stillhouse.data.language import LanguageData
from stillhouse.evaluation.language import held_out_quality
from stillhouse.evaluation.samples import continuations
from stillhouse.evaluation.speed import size_and_speed
from stillhouse.ranges import Count, Weight
from stillhouse.students.causal_lm import load_causal_lm


@dataclass(frozen=True)
class Evaluated:
    """What an evaluator returns.

    Attributes:
        models: role -> metric -> number.
        samples: rows of (role, prompt, continuation).
        pictures: name -> what draws it to a path and returns the path.
    """

    models: Mapping[str, Mapping[str, float | int]]
    samples: list[tuple[str, str, str]] = field(default_factory=list)
    pictures: Mapping[str, Callable[[Path], Path]] = field(default_factory=dict)


def language_models(
    models: Mapping[str, str],
    data: LanguageData,
    *,
    reference: str | None,
    prompts: list[str],
    max_new_tokens: Count,
    temperature: Weight,
    seed: int,
    speed_context: Count,
    speed_new_tokens: Count,
    speed_repeats: Count,
    dtype: str,
) -> Evaluated:
    """Evaluate every model on the test split of the data.

    Args:
        models: role -> path of its model.
        data: the held-out text; its tokenizer serves the metrics, each model's own the samples.
        reference: role of the teacher that the others are compared with; null has none.
        prompts: texts to go on from.
        max_new_tokens: length of a continuation.
        temperature: of the continuations; 0 takes the likeliest token.
        seed: of the continuations.
        speed_context, speed_new_tokens, speed_repeats: how speed is measured.
        dtype: torch dtype of the weights while evaluating.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(role: str) -> PreTrainedModel:
        model: Any = load_causal_lm(
            models[role], dtype=dtype, attn_implementation="sdpa", key=f"models.{role}"
        )
        return model.to(device).eval()

    batches = [batch.to(device) for batch in data.evaluation_batches("test")]
    text_bytes = data.text_bytes("test")
    teacher = load(reference) if reference is not None else None
    numbers: dict[str, Mapping[str, float | int]] = {}
    samples: list[tuple[str, str, str]] = []
    for role, path in models.items():
        model = teacher if teacher is not None and role == reference else load(role)
        quality = held_out_quality(model, teacher, batches, text_bytes=text_bytes)
        speed = size_and_speed(
            model, context=speed_context, new_tokens=speed_new_tokens, repeats=speed_repeats
        )
        numbers[role] = {**quality, **speed}
        texts = continuations(
            model,
            AutoTokenizer.from_pretrained(path),
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        samples += [(role, prompt, text) for prompt, text in zip(prompts, texts, strict=True)]
        del model
        gc.collect()
    return Evaluated(models=numbers, samples=samples)
