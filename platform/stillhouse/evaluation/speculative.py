"""Speculative decoding, exact: a draft proposes tokens, the target checks them in one pass.

Yaniv Leviathan, Matan Kalman, Yossi Matias, "Fast Inference from Transformers via Speculative
Decoding", arXiv:2211.17192; Charlie Chen et al., "Accelerating Large Language Model Decoding with
Speculative Sampling", arXiv:2302.01318. With p the target's law of the next token and q the
draft's, a token v ~ q is kept with probability min(1, p(v) / q(v)); in place of the first one that
is not kept, one is drawn from (p - q)₊ / Σ (p - q)₊; where all are kept, one more is drawn from p.
What comes out has the target's law, whatever the draft. At temperature 0 both laws have all their
mass on one token, so what comes out is the target's greedy text; there, numbers that differ by the
rounding of a pass over several tokens can still break a tie otherwise than token by token.

Both models keep a cache of keys and values and roll it back behind what is not kept. The cache
holds all tokens, in layers with a sliding window too: those forget the tokens before it, which a
rollback needs again, and their mask hides these anyway. States of layers that are no attention
cannot be rolled back.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from stillhouse.errors import UserError


@dataclass(frozen=True)
class Speculation:
    """What was written, and what it took.

    Attributes:
        tokens: behind the prompt, the end token included where it came.
        target_calls: passes of the target, the prompt's among them.
        tested: tokens that the draft proposed and that were looked at: behind the first that is
            not kept none is.
        accepted: those of them that were kept.
    """

    tokens: list[int]
    target_calls: int
    tested: int
    accepted: int


@torch.no_grad()
def speculate(
    target: PreTrainedModel,
    draft: PreTrainedModel,
    input_ids: Int[Tensor, "1 T"],
    *,
    draft_tokens: int,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator,
    end_token: int | None,
) -> Speculation:
    """Go on from a prompt as the target would, with a draft that proposes.

    A block is at most as long as what is left to write, and the draft stops behind an end token.

    Args:
        target: the model whose law the text has, in eval mode.
        draft: the model that proposes, in eval mode, with the same tokenizer. Where one of the two
            has more columns than the other (vocabularies are padded), those are masked.
        input_ids: the prompt, one row of one token or more.
        draft_tokens: γ, tokens that are proposed at a time; 0 leaves the target alone, and the
            draft is not asked.
        max_new_tokens: longest continuation.
        temperature: of both laws; 0 takes the likeliest token.
        generator: of the draws, on the models' device.
        end_token: ends the text; None has no such token.

    Raises:
        UserError: for a model with layers whose states cannot be rolled back.
    """
    columns = min(_columns(target), _columns(draft))
    verifier, proposer = (_Reader(m, columns, temperature) for m in (target, draft))
    text = input_ids[0].tolist()
    prompt, target_calls, tested, accepted = len(text), 0, 0, 0
    while len(text) - prompt < max_new_tokens and (len(text) == prompt or text[-1] != end_token):
        budget = min(draft_tokens, max_new_tokens - (len(text) - prompt) - 1)
        proposed, q = _propose(proposer, text, budget, end_token, generator)
        p = verifier.laws([*text, *proposed], len(proposed) + 1)
        kept, further = _verify(proposed, p, q, end_token, generator)
        text += [*proposed[:kept], *further]
        verifier.forget_behind(len(text) - 1)
        proposer.forget_behind(len(text) - 1)
        target_calls += 1
        tested += min(kept + len(further), len(proposed))
        accepted += kept
    return Speculation(text[prompt:], target_calls, tested, accepted)


def check_rollback(model: PreTrainedModel, *, where: str) -> None:
    """Refuse a model whose cache holds more than keys and values of attention.

    Raises:
        UserError: naming the kind of layer.
    """
    for layer in DynamicCache(config=model.config).layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise UserError(
                f"{where}: the cache of {type(model).__name__} has layers of the kind "
                f"{type(layer).__name__}, whose states cannot be rolled back behind a token that "
                "is not kept; expected a model with attention alone"
            )


class _Reader:
    """A model, and the beginning of a text that its cache holds."""

    def __init__(self, model: Any, columns: int, temperature: float) -> None:
        check_rollback(model, where="speculative decoding")
        self.model, self.columns, self.temperature = model, columns, temperature
        # Made without the config, it keeps every token in layers with a sliding window too.
        self.cache, self.held = DynamicCache(), 0

    def laws(self, text: Sequence[int], count: int) -> Float[Tensor, "count V"]:
        """Return the law of the token behind each of the last `count` tokens, in float64."""
        new = torch.tensor([text[self.held :]], device=self.model.device)
        self.held = len(text)
        logits = self.model(
            new, past_key_values=self.cache, use_cache=True, logits_to_keep=count
        ).logits[0, :, : self.columns]
        if self.temperature == 0:
            return torch.zeros_like(logits, dtype=torch.float64).scatter_(
                -1, logits.argmax(-1, keepdim=True), 1.0
            )
        return (logits.double() / self.temperature).softmax(-1)

    def forget_behind(self, length: int) -> None:
        """Keep the first `length` tokens of the text at most."""
        if self.held > length:
            self.cache.crop(length - self.held)
            self.held = length


def _propose(
    draft: _Reader,
    text: Sequence[int],
    count: int,
    end_token: int | None,
    generator: torch.Generator,
) -> tuple[list[int], list[Tensor]]:
    """Return tokens of the draft, and the laws that they were drawn from."""
    proposed: list[int] = []
    laws: list[Tensor] = []
    while len(proposed) < count and (not proposed or proposed[-1] != end_token):
        (q,) = draft.laws([*text, *proposed], 1)
        proposed.append(_draw(q, generator))
        laws.append(q)
    return proposed, laws


def _verify(
    proposed: Sequence[int],
    p: Float[Tensor, "count V"],
    q: Sequence[Tensor],
    end_token: int | None,
    generator: torch.Generator,
) -> tuple[int, list[int]]:
    """Return how many tokens are kept, and the one behind them; none behind the end token."""
    for place, token in enumerate(proposed):
        chance = torch.rand((), generator=generator, device=p.device, dtype=torch.float64)
        if chance * q[place][token] >= p[place, token]:
            return place, [_draw(residual(p[place], q[place]), generator)]
        if token == end_token:
            return place + 1, []
    return len(proposed), [_draw(p[-1], generator)]


def residual(p: Float[Tensor, "V"], q: Float[Tensor, "V"]) -> Float[Tensor, "V"]:
    """Return (p - q)₊, not normalised; p where nothing but rounding is left of it."""
    rest = (p - q).clamp(min=0)
    return rest if rest.sum() > torch.finfo(p.dtype).eps else p


def _draw(law: Float[Tensor, "V"], generator: torch.Generator) -> int:
    return int(torch.multinomial(law, 1, generator=generator))


def _columns(model: PreTrainedModel) -> int:
    """Return how many logits a model has."""
    head: Any = model.get_output_embeddings()
    return head.weight.shape[0]
