"""Continuations of prompts, to read what numbers do not say."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from stillhouse.errors import UserError

# What a decoder writes for bytes that are no whole character yet.
UNFINISHED = "\ufffd"


def continuations(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
) -> list[str]:
    """Return one sampled continuation of every prompt; the arguments are `continuation`'s."""
    return [
        continuation(
            model,
            tokenizer,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
        for prompt in prompts
    ]


@torch.no_grad()
def continuation(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    show: Callable[[str], object] | None = None,
) -> str:
    """Return one sampled continuation of a prompt, the prompt itself left out.

    Args:
        model: the model, in eval mode.
        tokenizer: its tokenizer.
        prompt: text to go on from.
        max_new_tokens: length of a continuation; it may end earlier at the end token.
        temperature: 0 takes the likeliest token.
        seed: of the draws, the same for every model, so that differences are the models'.
        show: called with each piece of the text as soon as it is made.

    Raises:
        UserError: as `prompt_tokens`.
    """
    ids = prompt_tokens(model, tokenizer, prompt, max_new_tokens).to(model.device)
    generator: Any = model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        output = generator.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            temperature=temperature if temperature > 0 else None,
            top_k=0 if temperature > 0 else None,
            pad_token_id=tokenizer.eos_token_id,
            streamer=None if show is None else TextPieces(tokenizer, show),
        )
    return _text(tokenizer, output[0, ids.shape[1] :].tolist())


def prompt_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int
) -> Tensor:
    """Return a prompt's tokens (1, T).

    Raises:
        UserError: when there are none, or more than the model's positions leave room for.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    limit = getattr(model.config, "max_position_embeddings", None)
    if not ids:
        raise UserError(f"prompts: {prompt!r} has no tokens; expected a text to go on from")
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise UserError(
            f"max_new_tokens={max_new_tokens}: with the {len(ids)} tokens of the prompt this is "
            f"more than the model's {limit} positions; expected at most {max(0, limit - len(ids))}"
        )
    return torch.tensor([ids])


def as_message(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Return the text by which a chat model is asked `prompt`, by its tokenizer's own template."""
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


class TextPieces(BaseStreamer):
    """Hands a text on while `generate` makes it: whole characters, in the order of reading."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], object]) -> None:
        self.tokenizer = tokenizer
        self.show = show
        self.shown = 0
        self.tokens: list[int] | None = None

    def put(self, value: Tensor) -> None:
        """Take the next tokens; the first ones are the prompt's and are not shown."""
        if self.tokens is None:
            self.tokens = []
            return
        self.tokens += value.flatten().tolist()
        self._show_up_to(_text(self.tokenizer, self.tokens).rstrip(UNFINISHED))

    def end(self) -> None:
        """Show what is left, finished or not."""
        self._show_up_to(_text(self.tokenizer, self.tokens or []))

    def _show_up_to(self, text: str) -> None:
        piece, self.shown = text[self.shown :], max(self.shown, len(text))
        if piece:
            self.show(piece)


def _text(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str)
    return text
