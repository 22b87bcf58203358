"""How well models draft for another one, as `conf/evaluation/speculative.yaml` names it."""

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillhouse.data.documents import TokenDocument
from stillhouse.data.encoding import encode
from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import check_same_tokenizer
from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluation.language_models import Evaluated
from stillhouse.evaluation.positions import KEY, check_positions
from stillhouse.evaluation.sharing_costs import ratio_of_medians
from stillhouse.evaluation.speculative import Speculation, check_rollback, speculate
from stillhouse.evaluation.speed import seconds
from stillhouse.ranges import Count, CountFrom2, Weight
from stillhouse.students.causal_lm import load_causal_lm


def speculative_decoding(
    models: Mapping[str, str],
    data: LanguageData,
    *,
    reference: str,
    draft_tokens: Count,
    max_sequences: Count,
    prompt_tokens: Count,
    max_new_tokens: CountFrom2,
    temperature: Weight,
    repeats: Count,
    seed: int,
    dtype: str,
    attn_implementation: str,
) -> Evaluated:
    """Let every model draft for the reference, batch 1, two models loaded at a time.

    What is written has the reference's law whatever drafts (`evaluation.speculative`), so what
    differs is the time. Target alone and target with draft take turns in one process, with torch's
    present number of threads; the target alone goes through the same loop, with the same cache.

    Args:
        models: role -> path of its model.
        data: its test split gives the prompts; its tokenizer is that of all models.
        reference: role of the target.
        draft_tokens: γ, tokens that are proposed at a time.
        max_sequences: go on from so many documents, spread evenly.
        prompt_tokens: tokens of a prompt of plain text; a conversation's is what stands before its
            first learnt token.
        max_new_tokens: longest continuation; it may end earlier at the end token.
        temperature: of both laws; 0 takes the likeliest token.
        repeats: turns of each side, after one that does not count.
        seed: of the draws.
        dtype: torch dtype of the weights.
        attn_implementation: attention of `transformers`.

    Returns:
        Of every role but the reference `acceptance`, the share of the tested tokens that were kept;
        `block_efficiency`, tokens a pass of the target; and `speculative_speedup`, the median time
        a token of the target alone over that with the draft. The reference has no numbers.

    Raises:
        UserError: for a reference that is no role, numbers that are too small, or too large for a
            model's positions, a tokenizer that is not the data's, a model whose cache cannot be
            rolled back, and data without a prompt.
    """
    if reference not in models:
        raise UserError(
            f"{KEY}.reference={reference}: there is no such model; expected {', '.join(models)}"
            f"{did_you_mean(reference, models)}"
        )
    if max_new_tokens < 2:
        raise UserError(
            f"{KEY}.max_new_tokens={max_new_tokens}: expected 2 or more; the last token is never "
            "proposed"
        )
    for role, path in models.items():
        check_same_tokenizer(path, data.tokenizer, key=f"models.{role}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    prompts = _prompts(data, max_sequences, prompt_tokens)

    def load(role: str) -> PreTrainedModel:
        key = f"models.{role}"
        model: Any = load_causal_lm(
            models[role], dtype=dtype, attn_implementation=attn_implementation, key=key
        )
        check_rollback(model, where=f"{key}.path={models[role]}")
        check_positions(model, role, max(map(len, prompts)), max_new_tokens)
        return model.to(device).eval()

    target = load(reference)
    rows = [torch.tensor([prompt], device=device) for prompt in prompts]
    settings = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "end_token": data.end_token,
    }
    alone = _Side(target, target, rows, seed, {**settings, "draft_tokens": 0})
    numbers: dict[str, Mapping[str, float | int]] = {}
    for role in models:
        if role == reference:
            # A row of the table all the same, in its place.
            numbers[role] = {}
            continue
        draft = load(role)
        both = _Side(target, draft, rows, seed, {**settings, "draft_tokens": draft_tokens})
        speedup = ratio_of_medians(alone.seconds_a_token, both.seconds_a_token, repeats)
        numbers[role] = {**both.measures(), "speculative_speedup": speedup}
        del draft, both
        gc.collect()
    return Evaluated(models=numbers)


@dataclass(frozen=True)
class _Side:
    """A target with what drafts for it, and what they have written so far."""

    target: PreTrainedModel
    draft: PreTrainedModel
    prompts: Sequence[Tensor]
    seed: int
    settings: Mapping[str, Any]
    written: list[Speculation] = field(default_factory=list)

    def seconds_a_token(self) -> float:
        """Go on from all prompts, the draws the same in every turn; return the time a token."""
        generator = torch.Generator(self.target.device).manual_seed(self.seed)
        self.written.clear()

        def work() -> None:
            for prompt in self.prompts:
                self.written.append(
                    speculate(self.target, self.draft, prompt, generator=generator, **self.settings)
                )

        taken = seconds(work, self.target)
        return taken / sum(len(s.tokens) for s in self.written)

    def measures(self) -> dict[str, float]:
        """Return acceptance and block efficiency of the last turn."""
        tokens = sum(len(s.tokens) for s in self.written)
        tested = sum(s.tested for s in self.written)
        return {
            "acceptance": sum(s.accepted for s in self.written) / max(1, tested),
            "block_efficiency": tokens / sum(s.target_calls for s in self.written),
        }


def _prompts(data: LanguageData, max_sequences: Count, prompt_tokens: Count) -> list[list[int]]:
    """Return the beginnings of test documents that have something behind them.

    Raises:
        UserError: when no document is long enough.
    """
    documents = data.documents("test")
    wanted = min(max_sequences, len(documents))
    chosen = [documents[i * len(documents) // wanted] for i in range(wanted)]
    encoded = encode(chosen, data.tokenizer, data.end_token)
    cut = [_beginning(document, prompt_tokens, data.end_token) for document in encoded]
    prompts = [prompt for prompt in cut if prompt]
    if not prompts:
        raise UserError(
            f"{KEY}.prompt_tokens={prompt_tokens}: none of {wanted} test documents is longer; "
            "expected fewer tokens, or data with longer documents"
        )
    return prompts


def _beginning(document: TokenDocument, prompt_tokens: Count, end_token: int) -> list[int]:
    """Return the prompt of a document, a text's with the end token before it; nothing if too short.

    A text is long enough when a token other than its end follows the prompt.
    """
    before = [end_token] if document.follows_end else []
    tokens, learned = [*before, *document.tokens], list(document.learned)
    if all(learned):
        return tokens[:prompt_tokens] if len(tokens) > prompt_tokens + 1 else []
    return tokens[: len(before) + learned.index(True)] if any(learned) else []
