"""How well and how fast encoders do their task, as `conf/evaluation/encoders.yaml` names it."""

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.data.encoders import EncoderData
from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluation.classification import main_of, scores
from stillhouse.evaluation.language_models import Evaluated
from stillhouse.evaluation.speed import medians_by_turns, seconds
from stillhouse.ranges import Count
from stillhouse.records.encoders import EncoderBatch
from stillhouse.students.encoder_layouts import max_tokens
from stillhouse.students.encoders import check_fits, has_head, load_encoder, read_encoder

BATCH_SIZES = (1, 32)


def encoder_models(
    models: Mapping[str, str],
    data: EncoderData,
    *,
    reference: str | None,
    score: str | None,
    speed_tokens: Count,
    speed_repeats: Count,
    dtype: str,
    attn_implementation: str,
) -> Evaluated:
    """Score every model on the test split of the task, and time it beside the reference.

    Both take turns in one process, with torch's present number of threads; two models are loaded
    at a time.

    Args:
        models: role -> path of its model.
        data: the task.
        reference: role of the teacher that the others are compared with; null has none.
        score: which of the scores `score_kept_percent` compares; null takes the main one.
        speed_tokens: tokens of each text that is timed; what it says does not matter.
        speed_repeats: turns of each side, after one that does not count.
        dtype: torch dtype of the weights while evaluating.
        attn_implementation: attention of `transformers`.

    Returns:
        Of every role the task's scores (`classification.scores`), `parameters`, and at batch sizes
        1 and 32 `latency_ms_1`, `latency_ms_32`, the median time of a batch, and `texts_per_s_1`,
        `texts_per_s_32`; against the reference, itself included, `score_kept_percent`, left out
        where its score is 0 or less, `parameters_ratio` (its number over the model's), `speedup_1`
        and `speedup_32` (its time over the model's).

    Raises:
        UserError: for a reference or a score that is not there, data without a task or without
            test labels, numbers below 1, a model without a head for the task, with another
            tokenizer, or with too few positions.
    """
    _check(models, reference)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = _labelled_batches(data)

    def load(role: str) -> PreTrainedModel:
        model: Any = _load(models[role], role, data, speed_tokens, dtype, attn_implementation)
        return model.to(device)

    base = None if reference is None else load(reference)
    numbers: dict[str, dict[str, float | int]] = {}
    found: dict[str, Mapping[str, float]] = {}
    for role in models:
        model = base if base is not None and role == reference else load(role)
        found[role] = scores_of(model, batches)
        numbers[role] = {
            **found[role],
            "parameters": model.num_parameters(),
            **_speeds(model, base, speed_tokens, speed_repeats),
        }
        if base is not None:
            ratio = base.num_parameters() / model.num_parameters()
            numbers[role]["parameters_ratio"] = ratio
        del model
        gc.collect()
    if reference is not None:
        for role, kept in _kept(found, reference, score).items():
            numbers[role]["score_kept_percent"] = kept
    return Evaluated(models=numbers)


@torch.no_grad()
def scores_of(model: PreTrainedModel, batches: Sequence[EncoderBatch]) -> Mapping[str, float]:
    """Return a model's scores over labelled batches, over all texts together.

    Args:
        model: with a head, in eval mode.
        batches: as the data hand them out.
    """
    logits: list[Tensor] = []
    for batch in batches:
        output = read_encoder(model, batch.to(model.device))
        assert output.logits is not None
        logits.append(output.logits.cpu())
    labels = torch.cat([batch.labels for batch in batches if batch.labels is not None])
    return scores(torch.cat(logits), labels)


def _load(
    path: str, role: str, data: EncoderData, tokens: int, dtype: str, attn_implementation: str
) -> PreTrainedModel:
    """Load a model that says something of the task."""
    key = f"models.{role}"
    if not has_head(path, key=key):
        raise UserError(
            f"{key}.path={path}: it has no head, so it says nothing of the task; expected a model "
            "that was fine-tuned or distilled on it"
        )
    model = load_encoder(
        path, task=data.task, dtype=dtype, attn_implementation=attn_implementation, key=key
    )
    check_fits(model, data, path=path, key=key)
    limit = max_tokens(model)
    if limit is not None and tokens > limit:
        raise UserError(
            f"evaluation.speed_tokens={tokens}: {key} has {limit} positions; expected {limit} or "
            "less"
        )
    return model.eval()


def _speeds(
    model: PreTrainedModel, base: PreTrainedModel | None, tokens: int, repeats: int
) -> dict[str, float]:
    """Return the times of a model at every batch size, and their ratios to the reference's."""
    speeds: dict[str, float] = {}
    for size in BATCH_SIZES:
        sides = [model] if base is None or base is model else [model, base]
        times = medians_by_turns([_reading(side, size, tokens) for side in sides], repeats)
        speeds[f"latency_ms_{size}"] = 1000 * times[0]
        speeds[f"texts_per_s_{size}"] = size / times[0]
        if base is not None:
            speeds[f"speedup_{size}"] = times[-1] / times[0]
    return speeds


def _reading(model: PreTrainedModel, size: int, tokens: int) -> Callable[[], float]:
    """Return what times one batch of texts without padding."""
    count = size * tokens
    ids = torch.arange(count, device=model.device).remainder(model.config.vocab_size)
    ids = ids.view(size, tokens)
    # RoBERTa takes the position of a padding token for padding.
    pad = model.config.pad_token_id
    ids = ids if pad is None else ids.masked_fill(ids == pad, pad + 1)
    batch = EncoderBatch(ids, torch.ones_like(ids, dtype=torch.bool))

    def timed() -> float:
        with torch.no_grad():
            return seconds(lambda: read_encoder(model, batch), model)

    return timed


def _kept(
    found: Mapping[str, Mapping[str, float]], reference: str, score: str | None
) -> dict[str, float]:
    """Return 100 · score / score of the reference of every role; nothing where that is 0 or less.

    Raises:
        UserError: for a score that the task does not have.
    """
    names = list(found[reference])
    name = main_of(found[reference]) if score is None else score
    if name not in names:
        raise UserError(
            f"evaluation.score={name}: the task has {', '.join(names)}{did_you_mean(name, names)}"
        )
    whole = found[reference][name]
    return {role: 100 * of[name] / whole for role, of in found.items()} if whole > 0 else {}


def _labelled_batches(data: EncoderData) -> list[EncoderBatch]:
    if data.task is None:
        raise UserError("data: text without labels has no scores; expected labelled text")
    batches = list(data.evaluation_batches("test"))
    if any(batch.labels is None for batch in batches):
        raise UserError("data: there are texts without labels in test; expected a label for each")
    return batches


def _check(models: Mapping[str, Any], reference: str | None) -> None:
    if reference is not None and reference not in models:
        raise UserError(
            f"evaluation.reference={reference}: there is no such model; expected "
            f"{', '.join(models)}{did_you_mean(reference, models)}"
        )
