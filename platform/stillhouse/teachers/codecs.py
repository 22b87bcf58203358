"""Codecs: how a teacher's signal is stored, and how it comes back as a signal.

A codec turns what a model says at n positions into tensors with n rows and back. Everything else
(which positions, in which files) is the store's business.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.tokens import log_probs
from stillhouse.ranges import Count, CountFrom0
from stillhouse.records.language import (
    LanguageOutput,
    LanguageSignal,
    TopKSignal,
    VocabularyHead,
)

DtypeName = Literal["float16", "float32"]
LAYER = "layer."
Rows = dict[str, Tensor]


class Codec(Protocol):
    """Stores one kind of signal."""

    keeps_head: bool

    def check(self, vocabulary_size: int) -> None:
        """Refuse a vocabulary that the codec cannot store.

        Raises:
            UserError: naming the key.
        """
        ...

    def encode(self, output: LanguageOutput, generator: torch.Generator) -> Rows:
        """Return tensors with a row for each row of `output`; `generator` decides every draw."""
        ...

    def decode(
        self, rows: Rows, vocabulary_size: int, head: VocabularyHead | None
    ) -> LanguageSignal:
        """Return the signal at these rows."""
        ...


def describe(codec: Codec) -> dict[str, Any]:
    """Return a codec's name and settings: equal descriptions store alike."""
    return {"name": type(codec).__name__, **vars(codec)}


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k likeliest tokens, the mass of all others, and a few tokens drawn from these.

    Token ids are packed to ⌈log2 V⌉ bits: with k = 64, 12 draws and V = 128,256 a position takes
    294 bytes in float16 instead of the 256 kB of its logits. The draws are those of Anshumann et
    al., "Sparse Logit Sampling", arXiv:2503.16870, from the tail alone.

    Attributes:
        k: kept tokens, exact.
        tail_samples: tokens drawn from the others, with replacement; they stand for the shape of
            the tail (`objectives.top_k`). 0 leaves it free.
        dtype: of the log-probabilities.
    """

    k: Count
    tail_samples: CountFrom0
    dtype: DtypeName
    keeps_head = False

    def check(self, vocabulary_size: int) -> None:
        """Refuse more tokens than there are."""
        if not 1 <= self.k <= vocabulary_size:
            raise UserError(
                f"codec.k={self.k}: the teacher's vocabulary has {vocabulary_size} tokens; "
                f"expected 1 to {vocabulary_size}"
            )
        if self.tail_samples < 0:
            raise UserError(f"codec.tail_samples={self.tail_samples}: expected 0 or more")

    def encode(self, output: LanguageOutput, generator: torch.Generator) -> Rows:
        """Keep the k likeliest tokens, the likeliest first, and draw from the rest."""
        log_p = log_probs(output.logits)
        vocabulary_size = log_p.shape[-1]
        top = log_p.topk(self.k, -1)
        rest = log_p.scatter(-1, top.indices, -torch.inf)
        residual = rest.logsumexp(-1)
        ids, entropy = top.indices, torch.zeros_like(residual)
        if self.k < vocabulary_size:
            tail = (rest - residual.unsqueeze(-1)).exp()
            entropy = torch.special.entr(tail).sum(-1)
            if self.tail_samples:
                drawn = tail.multinomial(self.tail_samples, replacement=True, generator=generator)
                ids = torch.cat([ids, drawn], -1)
        dtype = getattr(torch, self.dtype)
        return {
            "ids": pack(ids, bits_of(vocabulary_size)),
            "log_probs": top.values.to(dtype),
            "log_residual": residual.to(dtype),
            "tail_entropy": entropy.to(dtype),
            **_encode_layers(output, dtype),
        }

    def decode(self, rows: Rows, vocabulary_size: int, head: VocabularyHead | None) -> TopKSignal:
        """Return the kept tokens as a signal in float32."""
        samples = self.tail_samples if self.k < vocabulary_size else 0
        ids = unpack(rows["ids"], self.k + samples, bits_of(vocabulary_size))
        return TopKSignal(
            token_ids=ids[:, : self.k],
            log_probs=rows["log_probs"].float(),
            log_residual=rows["log_residual"].float(),
            tail_ids=ids[:, self.k :],
            tail_entropy=rows["tail_entropy"].float(),
            vocabulary_size=vocabulary_size,
            layers=_decode_layers(rows),
        )


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """The last hidden states; the head, stored once, makes logits of them: 2 D bytes a position.

    Attributes:
        dtype: of the hidden states.
    """

    dtype: DtypeName
    keeps_head = True

    def check(self, vocabulary_size: int) -> None:
        """Accept any vocabulary."""

    def encode(self, output: LanguageOutput, generator: torch.Generator) -> Rows:
        """Keep the hidden states."""
        dtype = getattr(torch, self.dtype)
        states = {"hidden_states": _stored(output.hidden_states, dtype)}
        return {**states, **_encode_layers(output, dtype)}

    def decode(
        self, rows: Rows, vocabulary_size: int, head: VocabularyHead | None
    ) -> LanguageOutput:
        """Return the hidden states with their head, in float32."""
        assert head is not None
        return LanguageOutput(
            hidden_states=rows["hidden_states"].float(), head=head, layers=_decode_layers(rows)
        )


def bits_of(vocabulary_size: int) -> int:
    """Return how many bits a token id takes."""
    return max(1, math.ceil(math.log2(vocabulary_size)))


def pack(ids: Tensor, bits: int) -> Tensor:
    """Pack ids [n, k] to `bits` bits each, low bit first, in rows of whole bytes."""
    wide = ids.cpu().numpy().astype(np.uint32)
    planes = (wide[..., None] >> np.arange(bits, dtype=np.uint32)) & 1
    flat = planes.astype(np.uint8).reshape(len(wide), -1)
    return torch.from_numpy(np.packbits(flat, axis=-1, bitorder="little"))


def unpack(packed: Tensor, k: Count, bits: int) -> Tensor:
    """Return the ids [n, k] that `pack` packed."""
    flat = np.unpackbits(packed.numpy(), axis=-1, count=k * bits, bitorder="little")
    planes = flat.reshape(len(flat), k, bits).astype(np.int64)
    return torch.from_numpy((planes << np.arange(bits)).sum(-1))


def _encode_layers(output: LanguageOutput, dtype: torch.dtype) -> Rows:
    return {f"{LAYER}{layer}": _stored(states, dtype) for layer, states in output.layers.items()}


def _stored(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Return hidden states in the type they are stored in; some models' do not fit into float16."""
    stored = states.to(dtype)
    if not torch.isfinite(stored).all():
        raise UserError(
            f"codec.dtype={str(dtype).removeprefix('torch.')}: the teacher has hidden states up to "
            f"{float(states.abs().max()):.3g}, more than that type holds; set codec.dtype=float32"
        )
    return stored


def _decode_layers(rows: Mapping[str, Tensor]) -> dict[int, Tensor]:
    layers = {n.removeprefix(LAYER): t for n, t in rows.items() if n.startswith(LAYER)}
    return {int(layer): states.float() for layer, states in layers.items()}
