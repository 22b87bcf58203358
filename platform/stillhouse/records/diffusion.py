"""What is passed between data, networks and methods of generative models.

Named tuples and not dataclasses: Lightning rebuilds a batch from its parts.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

UNCONDITIONAL = -1


class Condition(NamedTuple):
    """What samples are to be; a field is None where nothing of its kind is said of any.

    Attributes:
        labels: [B]; the class, `UNCONDITIONAL` for none.
        embeddings: [B, L, D]; a caption as a text encoder reads it.
        mask: [B, L]; True at the caption's tokens, nowhere for no caption.
    """

    labels: Int[Tensor, "B"] | None = None
    embeddings: Float[Tensor, "B L D"] | None = None
    mask: Bool[Tensor, "B L"] | None = None

    def dropped(self, where: Bool[Tensor, "B"]) -> "Condition":
        """Return it without what it says of some samples."""
        labels, mask = self.labels, self.mask
        return Condition(
            labels=None if labels is None else labels.masked_fill(where, UNCONDITIONAL),
            embeddings=self.embeddings,
            mask=None if mask is None else mask & ~where[:, None],
        )

    def none(self) -> "Condition":
        """Return it without what it says of any sample."""
        labels, mask = self.labels, self.mask
        return Condition(
            labels=None if labels is None else torch.full_like(labels, UNCONDITIONAL),
            embeddings=self.embeddings,
            mask=None if mask is None else torch.zeros_like(mask),
        )

    def first(self, count: int) -> "Condition":
        """Return it of the first samples."""
        return Condition(*(t if t is None else t[:count] for t in self))

    def repeated(self, times: int) -> "Condition":
        """Return the whole batch `times` times, one behind the other."""
        return Condition(*(t if t is None else torch.cat([t] * times) for t in self))

    def rolled(self) -> "Condition":
        """Return for each sample that of the one before it."""
        return Condition(*(t if t is None else t.roll(1, 0) for t in self))

    def picked(self, places: Int[Tensor, "M"]) -> "Condition":
        """Return it of some samples."""
        return Condition(*(t if t is None else t[places] for t in self))

    def differs(self, other: "Condition") -> Bool[Tensor, "B"]:
        """Return of which samples another one says something else."""
        pairs: Any = [(a, b) for a, b in zip(self, other, strict=True) if a is not None]
        found = [(a != b).flatten(1).any(1) if a.ndim > 1 else a != b for a, b in pairs]
        return torch.stack(found).any(0) if found else torch.zeros(0, dtype=torch.bool)

    def joined(self, *others: "Condition") -> "Condition":
        """Return the samples of all, one behind the other."""
        columns: Any = zip(self, *others, strict=True)
        return Condition(*(parts[0] if parts[0] is None else torch.cat(parts) for parts in columns))

    def to(self, *args: Any, **kwargs: Any) -> "Condition":
        """Move every field, as `torch.Tensor.to` does."""
        return Condition(*(t if t is None else t.to(*args, **kwargs) for t in self))


class ImageBatch(NamedTuple):
    """Samples of the data, of unit variance, with what is said of each.

    Attributes:
        x_0: [B, C, H, W], or [B, D] of points.
        condition: of each.
    """

    x_0: Float[Tensor, "B ..."]
    condition: Condition

    def to(self, *args: Any, **kwargs: Any) -> "ImageBatch":
        """Move every field, as `torch.Tensor.to` does."""
        return ImageBatch(self.x_0.to(*args, **kwargs), self.condition.to(*args, **kwargs))


class PairBatch(NamedTuple):
    """Noise, and the samples that a flow turned it into.

    Attributes:
        noise: [B, ...].
        x_0: of each, of the same shape.
        condition: of each.
    """

    noise: Float[Tensor, "B ..."]
    x_0: Float[Tensor, "B ..."]
    condition: Condition

    def to(self, *args: Any, **kwargs: Any) -> "PairBatch":
        """Move every field, as `torch.Tensor.to` does."""
        noise, x_0 = (part.to(*args, **kwargs) for part in (self.noise, self.x_0))
        return PairBatch(noise, x_0, self.condition.to(*args, **kwargs))


@runtime_checkable
class TrigFlowNetwork(Protocol):
    """F(x_t, t), the velocity dx_t/dt on TrigFlow's path."""

    def __call__(
        self,
        x_t: Float[Tensor, "B ..."],
        t: Float[Tensor, "B"],
        condition: Condition,
        guidance_scale: Float[Tensor, "B"] | None = None,
    ) -> Float[Tensor, "B ..."]:
        """Return F, of x_t's shape.

        Args:
            x_t: noisy samples.
            t: times from 0, data, to π/2, noise; float64.
            condition: what they are to be.
            guidance_scale: for a network that was distilled from a guided teacher and is told how
                strongly; None otherwise.
        """
        ...
