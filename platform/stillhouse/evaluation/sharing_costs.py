"""What a smaller attention saves: parameters, cache and time of every model against a reference.

The reference is the teacher: a student cut from it, unshared, has its shape, and its attention is
torch's SDPA. So the teacher is the same model unshared with the best attention that it can have.
"""

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from stillhouse.data.language import LanguageData
from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluation.language_models import Evaluated
from stillhouse.evaluation.speed import cache_bytes, medians_by_turns, seconds, some_tokens
from stillhouse.ranges import Count
from stillhouse.students.causal_lm import load_causal_lm


def sharing_costs(
    models: Mapping[str, str],
    data: LanguageData,
    *,
    reference: str,
    timed: list[str] | None,
    contexts: list[int],
    new_tokens: Count,
    repeats: Count,
    dtype: str,
) -> Evaluated:
    """Measure every model beside the reference, batch 1, two models loaded at a time.

    Both take turns in one process, with torch's present number of threads. `<work>_speedup_n<N>` is
    the median of the reference's times over that of the model's, for these works at a context N:

    - `prefill`: N tokens into an empty cache, logits of the last, as generation does it;
    - `decode`: the last `new_tokens` of N, one by one;
    - `training_step`: forward and backward of the cross-entropy of N tokens. The optimiser's step
      is left out: its time is that of the parameters, which `parameters_removed` counts, and the
      states of two would not fit where a training fits.

    Args:
        models: role -> path of its model.
        data: unused; the texts are made up, what they say does not matter.
        reference: role of the model that the others are compared with.
        timed: roles whose times are taken, where others are of the same shape; null takes all.
        contexts: the numbers N.
        new_tokens: tokens decoded in a turn.
        repeats: turns of each side, after one that does not count.
        dtype: torch dtype of the weights.

    Returns:
        Of a student that may share attention `shared_fraction`, followers over layers; of every
        role `parameters_removed` and `kv_cache_bytes_per_token` (as `cache_bytes`, over the tokens
        of the longest context), and of those that are timed but the reference the speed-ups.

    Raises:
        UserError: for a reference or a timed model that is no role, and numbers that are too small,
            or too large for a model's positions.
    """
    for key, roles in (("reference", [reference]), ("timed", timed or [])):
        for role in roles:
            if role not in models:
                raise UserError(
                    f"{key}={role}: there is no such model; expected {', '.join(models)}"
                    f"{did_you_mean(role, models)}"
                )
    _check_contexts(contexts, new_tokens)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def load(role: str) -> PreTrainedModel:
        key = f"models.{role}"
        model: Any = load_causal_lm(models[role], dtype=dtype, attn_implementation="sdpa", key=key)
        _check_positions(model, role, contexts)
        return model.to(device).eval()

    base = load(reference)
    numbers: dict[str, Mapping[str, float | int]] = {}
    for role in models:
        model = base if role == reference else load(role)
        measured: dict[str, float | int] = shared_fraction(model) | {
            "parameters_removed": base.num_parameters() - model.num_parameters(),
            "kv_cache_bytes_per_token": cache_bytes(_filled(model, max(contexts))) / max(contexts),
        }
        if model is not base and (timed is None or role in timed):
            for context in contexts:
                measured |= _speedups(base, model, context, new_tokens, repeats)
        numbers[role] = measured
        del model
        gc.collect()
    return Evaluated(models=numbers)


def shared_fraction(model: PreTrainedModel) -> dict[str, float]:
    """Return `shared_fraction` where a model's config says who leads whom, else nothing."""
    leaders = getattr(model.config, "attention_leaders", None)
    if leaders is None:
        return {}
    followers = sum(leader != layer for layer, leader in enumerate(leaders))
    return {"shared_fraction": followers / len(leaders)}


@dataclass(frozen=True)
class _Side:
    """A model and what it needs to do each work once."""

    model: Any
    tokens: Tensor
    new_tokens: Count
    filled: Cache

    def prefill(self) -> float:
        """Return the seconds of a prompt."""
        with torch.no_grad():
            return seconds(lambda: _prefill(self.model, self.tokens), self.model)

    def decode(self) -> float:
        """Return the seconds of the last tokens; the cache that they lengthen is a copy."""
        cache = copy.deepcopy(self.filled)

        def work() -> None:
            for token in self.tokens[:, -self.new_tokens :].split(1, dim=1):
                self.model(token, past_key_values=cache, use_cache=True)

        with torch.no_grad():
            return seconds(work, self.model)

    def training_step(self) -> float:
        """Return the seconds of a loss and its gradients, which are dropped."""
        self.model.train()

        def work() -> None:
            self.model(self.tokens, labels=self.tokens, use_cache=False).loss.backward()

        try:
            return seconds(work, self.model)
        finally:
            self.model.zero_grad(set_to_none=True)
            self.model.eval()


def _speedups(
    base: PreTrainedModel, model: PreTrainedModel, context: int, new_tokens: int, repeats: int
) -> dict[str, float]:
    """Return the three ratios at one context."""
    sides = [
        _Side(m, some_tokens(m, context), new_tokens, _filled(m, context - new_tokens))
        for m in (base, model)
    ]
    works = {
        "prefill": _Side.prefill,
        "decode": _Side.decode,
        "training_step": _Side.training_step,
    }
    return {
        f"{name}_speedup_n{context}": ratio_of_medians(
            lambda work=work: work(sides[0]), lambda work=work: work(sides[1]), repeats
        )
        for name, work in works.items()
    }


def ratio_of_medians(theirs: Callable[[], float], ours: Callable[[], float], repeats: int) -> float:
    """Return the median of `theirs` over that of `ours`, taken by turns after one for nothing."""
    of_theirs, of_ours = medians_by_turns([theirs, ours], repeats)
    return of_theirs / of_ours


def _prefill(model: Any, tokens: Tensor) -> Cache:
    """Return the cache of a prompt."""
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


@torch.no_grad()
def _filled(model: PreTrainedModel, count: int) -> Cache:
    return _prefill(model, some_tokens(model, count))


def _check_contexts(contexts: list[int], new_tokens: int) -> None:
    """Refuse contexts that leave nothing to measure."""
    if not contexts or min(contexts) <= new_tokens:
        raise UserError(
            f"contexts={contexts}: expected one number or more, each above new_tokens={new_tokens}"
        )


def _check_positions(model: PreTrainedModel, role: str, contexts: list[int]) -> None:
    """Refuse a context that the model has no positions for."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and max(contexts) > limit:
        raise UserError(
            f"contexts={contexts}: {max(contexts)} tokens are more than the {limit} positions of "
            f"models.{role}; expected at most {limit}"
        )
