"""Records of language modelling.

Shape legend: B batch, T positions, D width of the hidden states, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class SequenceBatch(NamedTuple):
    """Sequences and what follows each of their positions.

    A named tuple and not a dataclass: Lightning's precision plugins rebuild a batch from its parts.

    Attributes:
        input_ids: [B, T].
        labels: [B, T]; labels[b, t] is the token that follows input_ids[b, t].
        mask: [B, T]; True where labels[b, t] counts.
        attention_mask: [B, T]; True at real tokens. None when nothing is padded.
    """

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"] | None = None

    def to(self, *args: Any, **kwargs: Any) -> "SequenceBatch":
        """Move every field, as `torch.Tensor.to` does."""
        padding = self.attention_mask
        return SequenceBatch(
            input_ids=self.input_ids.to(*args, **kwargs),
            labels=self.labels.to(*args, **kwargs),
            mask=self.mask.to(*args, **kwargs),
            attention_mask=None if padding is None else padding.to(*args, **kwargs),
        )


@dataclass(frozen=True)
class VocabularyHead:
    """The last layer of a language model: logits = soft-cap(scale · (h Wᵀ + b)).

    Attributes:
        weight: [V, D].
        bias: [V] or None.
        logit_scale: factor on the logits (Cohere; the inverse of Granite's `logits_scaling`).
        logit_softcap: c in c · tanh(logits / c) (Gemma 2), or None.
    """

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def __call__(self, hidden_states: Float[Tensor, "*N D"]) -> Float[Tensor, "*N V"]:
        """Return the logits of hidden states, in the precision of the product."""
        logits = F.linear(hidden_states, self.weight, self.bias)
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_softcap is not None:
            logits = (logits / self.logit_softcap).tanh() * self.logit_softcap
        return logits


@dataclass(frozen=True)
class LanguageOutput:
    """What a language model says at every position; logits only when asked for.

    It serves as the student's output and as a live teacher's signal alike.

    Attributes:
        hidden_states: [B, T, D], or rows [n, D]: the last ones, as the head reads them.
        head: from hidden states to logits.
    """

    hidden_states: Float[Tensor, "*N D"]
    head: VocabularyHead

    @cached_property
    def logits(self) -> Float[Tensor, "*N V"]:
        """Logits of every position, computed once."""
        return self.head(self.hidden_states)

    def at(self, mask: Bool[Tensor, "*N"]) -> "LanguageOutput":
        """Return the output at the positions where `mask` is True, as rows [n, D].

        What stands at other positions, inf and NaN included, then touches neither value nor
        gradient, and the head is spared it. Asked again with the same mask, the same object comes
        back, so that two terms of one loss share their logits.
        """
        for known, kept in self._kept:
            if known is mask:
                return kept
        kept = LanguageOutput(hidden_states=self.hidden_states[mask], head=self.head)
        self._kept.append((mask, kept))
        return kept

    @cached_property
    def _kept(self) -> "list[tuple[Tensor, LanguageOutput]]":
        return []

    @property
    def vocabulary_size(self) -> int:
        """V, padding rows of the head included."""
        return self.head.weight.shape[0]


# What a teacher says of a batch, wherever it comes from.
LanguageSignal = LanguageOutput
