"""The weights of a saved model tensor by tensor: read where they lie, written one after the other.

A safetensors file is the length of its header (u64), the header (JSON: name -> type, shape, place
of the bytes) and the bytes. The header can be written before any tensor is known, so a model can be
made that never is in memory as a whole; what is read is mapped, and let go with its tensor.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
METADATA = "__metadata__"
# The types that are numbers and no codes, as a header names them.
FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it.

    Attributes:
        dtype: such as F32 or BF16.
        shape: its shape.
        bytes: how many there are.
    """

    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class WeightFile:
    """The header of a file.

    Attributes:
        path: the file.
        tensors: by name, in the order of their bytes.
        metadata: texts that the file carries along.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class StoredWeights:
    """The weights of a model folder.

    Attributes:
        files: one, or the shards that an index names.
        file_of: name of a tensor -> its file.
    """

    files: Sequence[WeightFile]
    file_of: Mapping[str, WeightFile]

    def describe(self, name: str) -> StoredTensor:
        """Return what the header says of a tensor."""
        return self.file_of[name].tensors[name]

    def read(self, name: str) -> Tensor:
        """Return a tensor, mapped: its pages are read when they are looked at."""
        with safe_open(self.file_of[name].path, framework="pt") as file:
            return file.get_tensor(name)


def stored_weights(path: str, *, key: str) -> StoredWeights:
    """Read the headers of a model folder's weights.

    Raises:
        UserError: when the folder is not there, has no safetensors, or one that cannot be read.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}={path}: there is no such folder; expected a model folder")
    shards = _shards(folder, f"{key}={path}")
    files = [_read_header(shard, f"{key}={path}") for shard in shards]
    return StoredWeights(files, {name: file for file in files for name in file.tensors})


def write_weights(
    path: Path,
    layout: Mapping[str, StoredTensor],
    metadata: Mapping[str, str],
    tensors: Iterable[Tensor],
) -> None:
    """Write a safetensors file, each tensor as soon as it comes.

    Args:
        path: the file; it is whole when this returns.
        layout: what the header says, in the order in which the tensors come.
        metadata: texts that the file carries along.
        tensors: the tensors.
    """
    header: dict[str, object] = {METADATA: dict(metadata)}
    end = 0
    for name, stored in layout.items():
        start, end = end, end + stored.bytes
        header[name] = {
            "dtype": stored.dtype,
            "shape": stored.shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # The bytes begin at a multiple of 8, so that every type can be mapped.
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)))
        file.write(text)
        coming = iter(tensors)
        for name, stored in layout.items():
            written = file.write(next(coming).reshape(-1).view(torch.uint8).numpy().data)
            assert written == stored.bytes, f"{name}: {written} bytes, expected {stored.bytes}"


def _shards(folder: Path, where: str) -> list[Path]:
    """Return the files of a folder's weights; as `transformers`, one file goes before an index."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise UserError(
            f"{where}: the folder has no {WEIGHTS} and no {INDEX}; expected weights as "
            "save_pretrained writes them; load the model and save it again, other formats are not "
            "read here"
        )
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: its {INDEX} cannot be read: {one_line(error)}") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{where}: its {INDEX} names {missing[0]}, which is missing; fetch it anew")
    return [folder / name for name in names]


def _read_header(path: Path, where: str) -> WeightFile:
    try:
        # The library checks the header and that the file is as long as it says.
        with safe_open(path, framework="pt"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: {path.name} cannot be read: {one_line(error)}") from error
    metadata = header.pop(METADATA, None) or {}
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    tensors = {
        name: StoredTensor(
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in in_order
    }
    return WeightFile(path, tensors, metadata)
