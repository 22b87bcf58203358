"""The store of a teacher's signal: shards with a row for every learnt position, and an index.

The index says of what the signal is (teacher, tokenizer, data) and how it is stored (codec). It is
compared with what a training asks for, so that a signal is never laid beside the wrong tokens.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from stillhouse.data.language import LanguageData
from stillhouse.data.vocabulary import tokenizer_identity
from stillhouse.errors import UserError
from stillhouse.files import hash_json, sha256_of, write_json
from stillhouse.records.language import VocabularyHead
from stillhouse.teachers.codecs import Codec, Rows, describe

INDEX = "signal.json"
HEAD = "head.safetensors"
FORMAT = 1
ANEW = "make it anew with force=cache"


@dataclass(frozen=True)
class Source:
    """What a signal was made of; two are equal when one can stand for the other.

    Attributes:
        teacher: hash of the model.
        tokenizer: hash of the vocabulary.
        data: hash of the windows and of what is learnt of them.
        codec: name and settings.
    """

    teacher: str
    tokenizer: str
    data: str
    codec: dict[str, Any]


@dataclass(frozen=True)
class Index:
    """The table of contents of a stored signal.

    Attributes:
        source: of what it was made.
        teacher_path: where the teacher lay, for people.
        vocabulary_size: V of the teacher's head.
        layers: whose hidden states are kept besides.
        shards: file name, windows, rows and sha256 of every shard, in the order of the windows.
    """

    source: Source
    teacher_path: str
    vocabulary_size: int
    layers: list[int]
    shards: list[dict[str, Any]]
    format: int = FORMAT


def model_identity(path: str) -> str:
    """Hash a model folder's weights and shape; of a hub id, the id and, if known, the commit."""
    folder = Path(path)
    if not folder.is_dir():
        revision = hub_revision(path)
        return f"hub:{path}" if revision is None else f"hub:{path}@{revision}"
    kept = [*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]
    return hash_json({p.name: sha256_of(p) for p in sorted(kept) if p.is_file()})


def hub_revision(id: str) -> str | None:
    """Return the commit of a model of the hub that lies on this machine; None where none does."""
    try:
        config = try_to_load_from_cache(id, "config.json")
    except HFValidationError:  # a folder that is not there is no id
        return None
    return Path(config).parent.name if isinstance(config, str) else None


def model_provenance(path: str) -> dict[str, str | None]:
    """Say which model something was made with: its folder's hash, or its commit on the hub."""
    if Path(path).is_dir():
        return {"model": path, "model_sha256": model_identity(path)}
    return {"model": path, "model_revision": hub_revision(path)}


def source_of(path: str, data: LanguageData, codec: Codec) -> Source:
    """Say of what the signal of the model at `path` on the training windows would be made."""
    return Source(
        teacher=model_identity(path),
        tokenizer=tokenizer_identity(data.tokenizer),
        data=data.windows("train").identity(),
        codec=describe(codec),
    )


def refuse_shifted_windows(data: LanguageData) -> None:
    """Refuse windows that are drawn anew in every epoch: a signal would belong to none of them.

    Raises:
        UserError: naming the key.
    """
    if data.shift_windows:
        raise UserError(
            "data.shift_windows=true: a cached signal belongs to fixed windows; set "
            "data.shift_windows=false, or take teacher=live"
        )


def write_shard(path: Path, rows: Rows, facts: dict[str, str]) -> None:
    """Write a shard with a few facts about it, whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in rows.items()}, partial, facts)
    partial.replace(path)


def facts_in(path: Path) -> dict[str, str]:
    """Return the facts that were written with a shard."""
    with safe_open(path, "pt") as shard:
        return shard.metadata()


def rows_in(path: Path) -> int | None:
    """Return the number of rows of a shard; None where it cannot be read."""
    try:
        with safe_open(path, "pt") as shard:
            names = shard.keys()
            return min(shard.get_slice(name).get_shape()[0] for name in names)
    except (OSError, SafetensorError, ValueError):
        return None


def write_head(folder: Path, head: VocabularyHead) -> None:
    """Store a head beside the shards."""
    facts = {"logit_scale": str(head.logit_scale), "logit_softcap": json.dumps(head.logit_softcap)}
    tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    kept = {name: t.detach().float().cpu().contiguous() for name, t in tensors.items()}
    save_file(kept, folder / HEAD, facts)


def read_head(folder: Path) -> VocabularyHead:
    """Return the head that `write_head` stored."""
    with safe_open(folder / HEAD, "pt") as file:
        facts, names = file.metadata(), file.keys()
        return VocabularyHead(
            weight=file.get_tensor("weight"),
            bias=file.get_tensor("bias") if "bias" in names else None,
            logit_scale=float(facts["logit_scale"]),
            logit_softcap=json.loads(facts["logit_softcap"]),
        )


def write_index(folder: Path, index: Index) -> None:
    """Write the table of contents; a folder without it is no signal."""
    write_json(folder / INDEX, asdict(index))


def read_index(folder: Path, *, key: str) -> Index:
    """Read the table of contents and check that every shard is whole.

    Raises:
        UserError: for a folder without a signal, of another version, or with a damaged shard.
    """
    try:
        content = json.loads((folder / INDEX).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{key}={folder}: there is no {INDEX} that can be read; expected what the stage "
            "`cache` wrote"
        ) from error
    if content.get("format") != FORMAT:
        raise UserError(
            f"{key}={folder}: the signal has format {content.get('format')}, this version reads "
            f"{FORMAT}; make it anew with force=cache"
        )
    index = Index(**{**content, "source": Source(**content["source"])})
    check_shards(folder, index.shards, key=key, index=INDEX, anew=ANEW)
    return index


def check_shards(
    folder: Path, shards: Sequence[dict[str, Any]], *, key: str, index: str, anew: str
) -> None:
    """Check that every shard is whole.

    Args:
        folder: where they lie.
        shards: file name and sha256 of each.
        key: of the folder in the config, for messages.
        index: name of the file that lists them.
        anew: how they are made anew.

    Raises:
        UserError: for one that is missing, cut short or changed.
    """
    for shard in shards:
        path = folder / shard["file"]
        if not path.is_file():
            raise UserError(f"{key}={folder}: {shard['file']} is missing; {anew}")
        if sha256_of(path) != shard["sha256"]:
            raise UserError(
                f"{key}={folder}: {shard['file']} was cut short or changed (its checksum differs "
                f"from the one in {index}); {anew}"
            )


def check_source(found: Source, wanted: Source, folder: Path, *, key: str) -> None:
    """Compare what a signal is with what is asked for.

    Raises:
        UserError: naming what does not match and the keys that decide it.
    """
    whose = {
        "teacher": "of another teacher; it has to be that of teacher.path",
        "tokenizer": "over another tokenizer's vocabulary; it has to be that of "
        "data.tokenizer_path",
        "data": "of other training windows; data.corpus, data.sequence_length, data.packing and "
        "data.max_train_documents decide them",
        "codec": f"stored as {_say(found.codec)}, not as codec={_say(wanted.codec)}",
    }
    for name, words in whose.items():
        if getattr(found, name) != getattr(wanted, name):
            raise UserError(f"{key}={folder}: the signal is {words}; {ANEW}, or take teacher=live")


def _say(codec: dict[str, Any]) -> str:
    settings = ", ".join(f"{k}={v}" for k, v in codec.items() if k != "name")
    return f"{codec.get('name')}({settings})"


class SignalReader:
    """Reads the rows of windows from the shards, which stay on disk."""

    def __init__(self, folder: Path, index: Index, lengths: Sequence[int]) -> None:
        """Open the shards.

        Args:
            folder: where they lie.
            index: their table of contents.
            lengths: learnt positions of every window, in order.
        """
        self._places: list[tuple[int, int, int]] = []
        self._paths = [folder / shard["file"] for shard in index.shards]
        self._open: dict[int, Any] = {}
        windows = iter(lengths)
        for number, shard in enumerate(index.shards):
            row = 0
            for _ in range(shard["windows"]):
                length = next(windows)
                self._places.append((number, row, row + length))
                row += length

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind: another process opens its own."""
        return {**self.__dict__, "_open": {}}

    def rows(self, windows: Sequence[int]) -> Rows:
        """Return the rows of these windows, one window after the other."""
        pieces: dict[str, list[Tensor]] = {}
        for window in windows:
            number, start, stop = self._places[window]
            if number not in self._open:
                self._open[number] = safe_open(self._paths[number], "pt").__enter__()
            shard = self._open[number]
            names = shard.keys()
            for name in names:
                pieces.setdefault(name, []).append(shard.get_slice(name)[start:stop])
        return {name: torch.cat(tensors) for name, tensors in pieces.items()}
