"""The store of an encoder's signal: shards with the tokens of texts, one text after the other.

A text is found by a key, the hash of its own tokens and types: in whichever split, subset or order
it comes, a signal is never laid beside another text. Axes as in `records.encoders`; M texts of a
shard, T their tokens without padding, W everything that is kept of a token.

    tokens   [T, W]   hidden states of the layers, then queries, keys and values of the layers
    logits   [M, C]   in float32; none of an encoder without a head
    keys     [M, 16]  bytes
    lengths  [M]
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from stillhouse.data.vocabulary import tokenizer_identity
from stillhouse.errors import UserError
from stillhouse.files import write_json
from stillhouse.records.encoders import AttentionTap, EncoderBatch, EncoderOutput
from stillhouse.teachers.signals import check_shards, model_identity

INDEX = "encoder_signal.json"
FORMAT = 2
ANEW = "make it anew with force=<its stage>"
Rows = dict[str, Tensor]
Key = bytes
KEY_BYTES = 16


@dataclass(frozen=True)
class Source:
    """What a signal was made of.

    Attributes:
        teacher: hash of the model.
        tokenizer: hash of the vocabulary.
    """

    teacher: str
    tokenizer: str


@dataclass(frozen=True)
class EncoderIndex:
    """The table of contents of a stored signal.

    Attributes:
        source: of what it was made.
        hidden_layers, attention_layers: the teacher's, whose states and taps are kept.
        width: D, of a hidden state and of a token's queries, keys or values together.
        heads: H.
        shards: file name, texts and sha256 of every shard.
    """

    source: Source
    hidden_layers: list[int]
    attention_layers: list[int]
    width: int
    heads: int
    shards: list[dict[str, Any]] = field(default_factory=list)
    format: int = FORMAT


def source_of(path: str, tokenizer: Any) -> Source:
    """Say of what a signal of the model at `path` would be made."""
    return Source(model_identity(path), tokenizer_identity(tokenizer))


def keys_of(batch: EncoderBatch) -> list[Key]:
    """Return the key of every text of a batch; padding has no part in it."""
    ids, mask = batch.input_ids.cpu(), batch.attention_mask.cpu()
    kinds = None if batch.token_type_ids is None else batch.token_type_ids.cpu()
    texts = range(len(ids))
    return [_key(ids[i][mask[i]], None if kinds is None else kinds[i][mask[i]]) for i in texts]


def _key(ids: Int[Tensor, "n"], types: Int[Tensor, "n"] | None) -> Key:
    content = ids.long().numpy().tobytes()
    if types is not None:
        content += types.long().numpy().tobytes()
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def encode(output: EncoderOutput, batch: EncoderBatch, dtype: torch.dtype) -> Rows:
    """Return what is stored of a batch, padding left out.

    Args:
        output: what the teacher says, of the layers that are kept.
        batch: the texts.
        dtype: of what is kept of tokens.
    """
    mask = batch.attention_mask
    parts = list(output.hidden_states.values())
    for tap in output.attention.values():
        parts += [x.transpose(1, 2).flatten(2) for x in (tap.queries, tap.keys, tap.values)]
    keys = bytearray(b"".join(keys_of(batch)))
    rows = {
        "keys": torch.frombuffer(keys, dtype=torch.uint8).view(-1, KEY_BYTES),
        "lengths": mask.sum(-1).cpu(),
    }
    if parts:
        rows["tokens"] = torch.cat([part[mask] for part in parts], -1).to(dtype).cpu()
    if output.logits is not None:
        rows["logits"] = output.logits.float().cpu()
    return rows


def write_index(folder: Path, index: EncoderIndex) -> None:
    """Write the table of contents; a folder without it is no signal."""
    write_json(folder / INDEX, asdict(index))


def read_index(folder: Path, *, key: str) -> EncoderIndex:
    """Read the table of contents and check that every shard is whole.

    Raises:
        UserError: for a folder without a signal, of another version, or with a damaged shard.
    """
    try:
        content = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={folder}: there is no {INDEX} that can be read; expected what the stage "
            "`cache_encoder` wrote"
        ) from error
    if content.get("format") != FORMAT:
        raise UserError(
            f"{key}={folder}: the signal has format {content.get('format')}, this version reads "
            f"{FORMAT}; {ANEW}"
        )
    index = EncoderIndex(**{**content, "source": Source(**content["source"])})
    check_shards(folder, index.shards, key=key, index=INDEX, anew=ANEW)
    return index


class EncoderSignalReader:
    """Reads what was stored of texts; the shards stay on disk."""

    def __init__(self, folder: Path, index: EncoderIndex) -> None:
        self.index = index
        self._shards = [safe_open(folder / s["file"], "pt").__enter__() for s in index.shards]
        self._places: dict[Key, tuple[int, int, int, int]] = {}
        for number, shard in enumerate(self._shards):
            keys = shard.get_tensor("keys").numpy()
            start = 0
            for row, length in enumerate(shard.get_tensor("lengths").tolist()):
                self._places[keys[row].tobytes()] = (number, row, start, start + length)
                start += length

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def read(self, batch: EncoderBatch, keys: Sequence[Key]) -> EncoderOutput:
        """Return what is kept of a batch's texts, all layers, zeros at the padding."""
        places = [self._places[key] for key in keys]
        layers: Iterator[Tensor] = iter(())
        if self.index.hidden_layers or self.index.attention_layers:
            # As float32 from here on: autocast refuses to join what is stored as float16.
            slices = (self._slice(n, "tokens", start, stop) for n, _, start, stop in places)
            layers = self._layers(torch.cat([s.float() for s in slices]), batch.attention_mask)
        hidden = {layer: next(layers) for layer in self.index.hidden_layers}
        attention = {
            layer: AttentionTap(*(self._by_head(next(layers)) for _ in range(3)))
            for layer in self.index.attention_layers
        }
        logits = None
        if "logits" in self._shards[0].keys():  # noqa: SIM118 - a file, not a mapping
            rows = [self._slice(n, "logits", row, row + 1) for n, row, _, _ in places]
            logits = torch.cat(rows).to(batch.input_ids.device)
        return EncoderOutput(hidden, attention, logits)

    def _slice(self, shard: int, name: str, start: int, stop: int) -> Tensor:
        return self._shards[shard].get_slice(name)[start:stop]

    def _layers(self, tokens: Tensor, mask: Tensor) -> Iterator[Float[Tensor, "B N D"]]:
        """Yield what is kept of each layer, laid out over the batch."""
        laid_out = torch.zeros(*mask.shape, tokens.shape[-1], device=mask.device)
        laid_out[mask] = tokens.to(mask.device)
        yield from laid_out.split(self.index.width, -1)

    def _by_head(self, flat: Float[Tensor, "B N HE"]) -> Float[Tensor, "B H N E"]:
        return flat.unflatten(-1, (self.index.heads, -1)).transpose(1, 2)
