"""Records that encoders' families, methods, teachers and data exchange.

Axes: B rows, N tokens, D hidden width, H attention heads, E width of a head, C classes or targets.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


class EncoderBatch(NamedTuple):
    """Texts, or pairs of texts, and what is known of them.

    A named tuple and not a dataclass: Lightning's precision plugins rebuild a batch from its parts.

    Attributes:
        input_ids: [B, N].
        attention_mask: [B, N]; True at real tokens.
        token_type_ids: [B, N]; 1 in the second text of a pair. None for models that know no types.
        labels: [B] class indices; [B] floats, the targets of a regression; or [B, C] floats, 1 for
            every class that holds, of several labels. None where a text has no label.
    """

    input_ids: Int[Tensor, "B N"]
    attention_mask: Bool[Tensor, "B N"]
    token_type_ids: Int[Tensor, "B N"] | None = None
    labels: Num[Tensor, "B *C"] | None = None

    def to(self, *args: Any, **kwargs: Any) -> "EncoderBatch":
        """Move every field, as `torch.Tensor.to` does."""
        fields: Any = (None if f is None else f.to(*args, **kwargs) for f in self)
        return EncoderBatch(*fields)


@dataclass(frozen=True)
class AttentionTap:
    """What the attention of one layer, softmax(Q K^T / sqrt(E)) V, computes with.

    Attributes:
        queries, keys, values: [B, H, N, E].
    """

    queries: Float[Tensor, "B H N E"]
    keys: Float[Tensor, "B H N E"]
    values: Float[Tensor, "B H N E"]


@dataclass(frozen=True)
class EncoderOutput:
    """What an encoder says of a batch: a student's output, and a teacher's signal alike.

    In a signal, layers are numbered as the student's that they are matched with: the layer map has
    been applied, so that a method compares equal keys.

    Attributes:
        hidden_states: layer -> [B, N, D]: 0 the embeddings, i what block i hands on; of the layers
            that were asked for.
        attention: layer -> what block i attends with, i from 1; alike.
        logits: [B, C], or [B, 1] of a regression; None of an encoder without a head.
    """

    hidden_states: Mapping[int, Float[Tensor, "B N D"]] = field(default_factory=dict)
    attention: Mapping[int, AttentionTap] = field(default_factory=dict)
    logits: Float[Tensor, "B C"] | None = None
