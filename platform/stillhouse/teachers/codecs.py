"""Codecs: how a teacher's signal is stored, and how it comes back as a signal.

A codec turns what a model says at n positions into tensors with n rows and back. Everything else
(which positions, in which files) is the store's business.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.tokens import log_probs
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

    def encode(self, output: LanguageOutput) -> Rows:
        """Return tensors with a row for each row of `output`."""
        ...

    def decode(
        self, rows: Rows, vocabulary_size: int, head: VocabularyHead | None
    ) -> LanguageSignal:
        """Return the signal at these rows."""
        ...


def describe(codec: Codec) -> dict[str, Any]:
    """Return a codec's name and settings: equal descriptions store alike."""
    return {"name": type(codec).__name__, **asdict(codec)}  # type: ignore[call-overload]


@dataclass(frozen=True, kw_only=True)
class TopK:
    """The k likeliest tokens and the mass of all others: 3 to 5 bytes a kept token.

    Token ids are packed to ⌈log2 V⌉ bits: with k = 64 and V = 128,256 a position takes 266 bytes in
    float16 instead of the 256 kB of its logits.

    Attributes:
        k: kept tokens.
        dtype: of the log-probabilities.
    """

    k: int
    dtype: DtypeName
    keeps_head = False

    def check(self, vocabulary_size: int) -> None:
        """Refuse more tokens than there are."""
        if not 1 <= self.k <= vocabulary_size:
            raise UserError(
                f"codec.k={self.k}: the teacher's vocabulary has {vocabulary_size} tokens; "
                f"expected 1 to {vocabulary_size}"
            )

    def encode(self, output: LanguageOutput) -> Rows:
        """Keep the k likeliest tokens, the likeliest first."""
        log_p = log_probs(output.logits)
        top = log_p.topk(self.k, -1)
        rest = log_p.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
        dtype = getattr(torch, self.dtype)
        return {
            "ids": pack(top.indices, bits_of(log_p.shape[-1])),
            "log_probs": top.values.to(dtype),
            "log_residual": rest.to(dtype),
            **_encode_layers(output, dtype),
        }

    def decode(self, rows: Rows, vocabulary_size: int, head: VocabularyHead | None) -> TopKSignal:
        """Return the kept tokens as a signal in float32."""
        return TopKSignal(
            token_ids=unpack(rows["ids"], self.k, bits_of(vocabulary_size)),
            log_probs=rows["log_probs"].float(),
            log_residual=rows["log_residual"].float(),
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

    def encode(self, output: LanguageOutput) -> Rows:
        """Keep the hidden states."""
        dtype = getattr(torch, self.dtype)
        return {"hidden_states": output.hidden_states.to(dtype), **_encode_layers(output, dtype)}

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


def unpack(packed: Tensor, k: int, bits: int) -> Tensor:
    """Return the ids [n, k] that `pack` packed."""
    flat = np.unpackbits(packed.numpy(), axis=-1, count=k * bits, bitorder="little")
    planes = flat.reshape(len(flat), k, bits).astype(np.int64)
    return torch.from_numpy((planes << np.arange(bits)).sum(-1))


def _encode_layers(output: LanguageOutput, dtype: torch.dtype) -> Rows:
    return {f"{LAYER}{layer}": states.to(dtype) for layer, states in output.layers.items()}


def _decode_layers(rows: Mapping[str, Tensor]) -> dict[int, Tensor]:
    layers = {n.removeprefix(LAYER): t for n, t in rows.items() if n.startswith(LAYER)}
    return {int(layer): states.float() for layer, states in layers.items()}
