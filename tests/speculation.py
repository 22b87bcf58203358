"""Speculative decoding as its definition reads, without caches; and models of a table of laws."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig


class Table:
    """A model whose next token depends on the last one alone.

    Args:
        laws: [V, V]; row v is the law behind the token v. A single row is the law behind any.
    """

    device = torch.device("cpu")

    def __init__(self, laws: Any) -> None:
        self.laws = torch.as_tensor(laws, dtype=torch.float64)
        self.config = LlamaConfig(num_hidden_layers=1)

    def get_output_embeddings(self) -> Any:
        return SimpleNamespace(weight=torch.empty(self.laws.shape[-1], 0))

    def __call__(self, ids: Tensor, *, logits_to_keep: int, **cache: Any) -> Any:
        last = ids[:, -logits_to_keep:]
        rows = self.laws[last] if self.laws.ndim == 2 else self.laws.expand(*last.shape, -1)
        return SimpleNamespace(logits=rows.log())


def some_laws(*sizes: int, seed: int) -> Tensor:
    """Return random laws, none of a token below a hundredth."""
    logits = torch.randn(*sizes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return 0.01 + (1 - 0.01 * sizes[-1]) * logits.softmax(-1)


@torch.no_grad()
def law_behind(model: Any, text: Sequence[int], temperature: float) -> Tensor:
    """Return a language model's law of the next token, the whole text read anew."""
    logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].double()
    if temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(), len(logits)).double()
    return (logits / temperature).softmax(-1)


def plainly(
    target: Any,
    draft: Any,
    prompt: Sequence[int],
    *,
    draft_tokens: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    end_token: int | None,
) -> tuple[list[int], int, int, int]:
    """Return (tokens, target's passes, tokens tested, tokens accepted)."""

    def draw(law: Tensor) -> int:
        return int(torch.multinomial(law, 1, generator=generator))

    text, passes, tested, accepted = list(prompt), 0, 0, 0
    while len(text) < len(prompt) + max_new_tokens:
        passes += 1
        proposed: list[tuple[int, Tensor]] = []
        room = len(prompt) + max_new_tokens - len(text) - 1
        for _ in range(min(draft_tokens, room)):
            q = law_behind(draft, [*text, *(v for v, _ in proposed)], temperature)
            proposed.append((draw(q), q))
            if proposed[-1][0] == end_token:
                break
        for v, q in proposed:
            p = law_behind(target, text, temperature)
            tested += 1
            if torch.rand((), dtype=torch.float64, generator=generator) * q[v] >= p[v]:
                text.append(draw((p - q).clamp(min=0)))
                break
            accepted += 1
            text.append(v)
            if v == end_token:
                break
        else:
            text.append(draw(law_behind(target, text, temperature)))
        if text[-1] == end_token:
            break
    return text[len(prompt) :], passes, tested, accepted
