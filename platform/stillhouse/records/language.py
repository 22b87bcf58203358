"""Records of language modelling.

Shape legend: B batch, T positions, D width of the hidden states, V vocabulary, k kept tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillhouse_kernels.dispatch import Backend


class SequenceBatch(NamedTuple):
    """Sequences and what follows each of their positions.

    A named tuple and not a dataclass: Lightning's precision plugins rebuild a batch from its parts.

    Attributes:
        input_ids: [B, T].
        labels: [B, T]; labels[b, t] is the token that follows input_ids[b, t].
        mask: [B, T]; True where labels[b, t] counts.
        attention_mask: [B, T]; True at real tokens. None when nothing is padded.
        windows: [B]; which window of its split each row is, by which a cached signal is found. None
            where a window is drawn at random.
    """

    input_ids: Int[Tensor, "B T"]
    labels: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]
    attention_mask: Bool[Tensor, "B T"] | None = None
    windows: Int[Tensor, "B"] | None = None

    def to(self, *args: Any, **kwargs: Any) -> "SequenceBatch":
        """Move every field, as `torch.Tensor.to` does."""
        fields: Any = (None if f is None else f.to(*args, **kwargs) for f in self)
        return SequenceBatch(*fields)


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

    def of_first(self, tokens: int) -> "VocabularyHead":
        """Return the head of the first tokens; its tensors are views."""
        bias = None if self.bias is None else self.bias[:tokens]
        return replace(self, weight=self.weight[:tokens], bias=bias)


@dataclass(frozen=True)
class LanguageOutput:
    """What a language model says at every position; logits only when asked for.

    It serves as the student's output and as the signal of a teacher whose last hidden states are
    known, live or cached, alike.

    Attributes:
        hidden_states: [B, T, D], or rows [n, D]: the last ones, as the head reads them.
        head: from hidden states to logits.
        layers: layer -> [B, T, D] or rows [n, D]: hidden states that were asked for, numbered as in
            `transformers`: 0 the embeddings, i what block i hands on.
        loss_backend: of a student, how a loss over the vocabulary is had: None from logits, else
            that backend of `stillhouse_kernels.linear_divergence`, which never holds them all.
    """

    hidden_states: Float[Tensor, "*N D"]
    head: VocabularyHead
    layers: Mapping[int, Float[Tensor, "*N D"]] = field(default_factory=dict)
    loss_backend: Backend | None = None

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
        kept = LanguageOutput(
            hidden_states=self.hidden_states[mask],
            head=self.head,
            layers={layer: states[mask] for layer, states in self.layers.items()},
            loss_backend=self.loss_backend,
        )
        self._kept.append((mask, kept))
        return kept

    @cached_property
    def _kept(self) -> "list[tuple[Tensor, LanguageOutput]]":
        return []

    @property
    def vocabulary_size(self) -> int:
        """V, padding rows of the head included."""
        return self.head.weight.shape[0]


@dataclass(frozen=True)
class TopKSignal:
    """The k likeliest next tokens with their probabilities, and what is known of all others.

    Attributes:
        token_ids: [B, T, k], or rows [n, k].
        log_probs: their log-probabilities over the whole vocabulary, at temperature 1.
        log_residual: [B, T] or [n]: log-probability that none of them comes; -inf where k = V.
        tail_ids: [B, T, s] or [n, s]: tokens drawn from the distribution of the others; s may be 0.
        tail_entropy: [B, T] or [n]: entropy of that distribution, nats.
        vocabulary_size: V of the model that said it.
        layers: as in `LanguageOutput`.
    """

    token_ids: Int[Tensor, "*N k"]
    log_probs: Float[Tensor, "*N k"]
    log_residual: Float[Tensor, "*N"]
    tail_ids: Int[Tensor, "*N s"]
    tail_entropy: Float[Tensor, "*N"]
    vocabulary_size: int
    layers: Mapping[int, Float[Tensor, "*N D"]] = field(default_factory=dict)

    def at(self, mask: Bool[Tensor, "*N"]) -> "TopKSignal":
        """Return the signal at the positions where `mask` is True, as rows [n, k]."""
        return TopKSignal(
            token_ids=self.token_ids[mask],
            log_probs=self.log_probs[mask],
            log_residual=self.log_residual[mask],
            tail_ids=self.tail_ids[mask],
            tail_entropy=self.tail_entropy[mask],
            vocabulary_size=self.vocabulary_size,
            layers={layer: states[mask] for layer, states in self.layers.items()},
        )


# What a teacher says of a batch, wherever it comes from.
LanguageSignal = LanguageOutput | TopKSignal
