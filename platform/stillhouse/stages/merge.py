"""The stage `merge`: one model out of two of the same shape, tensor by tensor."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from torch import Tensor

from stillhouse.data.vocabulary import load_tokenizer
from stillhouse.errors import UserError
from stillhouse.files import MANIFEST
from stillhouse.stages.artifacts import Number
from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.students.causal_lm import check_model_folder
from stillhouse.students.weight_files import (
    FLOATS,
    INDEX,
    WEIGHTS,
    StoredWeights,
    WeightFile,
    stored_weights,
    write_weights,
)
from stillhouse.students.weight_merging import cosine, is_finite
from stillhouse.tracking.work import WorkProgress

# What stands beside the weights and is the first model's: config, tokenizer, code, licence.
BESIDE = ("*.json", "*.jinja", "*.txt", "*.model", "*.py", "LICEN[CS]E*", "NOTICE*", "COPYING*")
# What `transformers` asks of a file.
PLAIN = {"format": "pt"}
# What a config says besides how the tensors are used; their types are compared themselves.
TELLING = ("_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache")
EXAMPLE = "expected two models of one architecture, such as two trainings of one student"


@dataclass(frozen=True, kw_only=True)
class Merge:
    """Write a model folder whose every tensor is made of the two models' tensors of that name.

    Neither model is ever in memory as a whole: a tensor of each is mapped, merged and written,
    then the next. Files are cut as the first model's are; all but the weights is a copy of the
    first's. Tensors that are no floating-point numbers of 16 bits or more (counters, codes of
    quantised weights) cannot be merged and must be equal.

    Attributes:
        path: the first model, a folder.
        other_path: the second model, a folder.
        merging: of `students.weight_merging`, partial, called with two tensors.
    """

    path: str
    other_path: str
    merging: dict[str, Any]

    def __call__(self, context: StageContext) -> StageResult:
        """Merge; write the model folder."""
        key = f"stages.{context.name}"
        check_model_folder(self.path, key=key)
        first = stored_weights(self.path, key=f"{key}.path")
        other = stored_weights(self.other_path, key=f"{key}.other_path")
        self._check_same_tensors(first, other, key)
        self._check_same_config(key)
        self._check_same_tokenizer(key)
        merge = instantiate(self.merging)
        cosines: list[float] = []
        count = len(first.file_of)
        with WorkProgress(context.name, count, "tensors", context.console) as progress:

            def merged(file: WeightFile) -> Iterator[Tensor]:
                for name in file.tensors:
                    tensor, cos = self._merged(name, first, other, merge, key)
                    cosines.extend([] if cos is None else [cos])
                    progress.advance(1)
                    yield tensor
                    # Let go before the next one is made.
                    del tensor

            for file in first.files:
                place, metadata = context.output / file.path.name, file.metadata or PLAIN
                write_weights(place, file.tensors, metadata, merged(file))
        self._copy_what_is_beside(context.output, sharded=first.files[0].path.name != WEIGHTS)
        shapes = [first.describe(name).shape for name in first.file_of]
        metrics: dict[str, Number] = {
            "tensors": count,
            "parameters": sum(map(math.prod, shapes)),
        }
        if cosines:
            metrics["mean_cosine"] = sum(cosines) / len(cosines)
        return StageResult(metrics=metrics)

    def _merged(
        self,
        name: str,
        first: StoredWeights,
        other: StoredWeights,
        merge: Callable[[Tensor, Tensor], Tensor],
        key: str,
    ) -> tuple[Tensor, float | None]:
        """Return the merged tensor, and the cosine between the two where there is one.

        Raises:
            UserError: for different tensors of a type that cannot be merged, and for what is not
                finite.
        """
        a, b = first.read(name), other.read(name)
        dtype = first.describe(name).dtype
        if dtype in FLOATS:
            for where, path, tensor in (("path", self.path, a), ("other_path", self.other_path, b)):
                if not is_finite(tensor):
                    raise UserError(
                        f"{key}.{where}={path}: its tensor {name} holds NaN or infinity; expected "
                        "a model that was trained without; take an earlier one"
                    )
            merged = merge(a, b)
            if not is_finite(merged):
                raise UserError(
                    f"{key}: the merged tensor {name} is too large for the type {dtype}; lower the "
                    "weights of merging, or save both models as F32"
                )
            return merged, cosine(a, b)
        if not torch.equal(_as_bytes(a), _as_bytes(b)):
            raise UserError(
                f"{key}.other_path={self.other_path}: its tensor {name} differs from that of "
                f"{self.path}, and the type {dtype} cannot be merged; expected one of "
                f"{', '.join(FLOATS)}, or equal tensors"
            )
        return a, None

    def _check_same_tensors(self, first: StoredWeights, other: StoredWeights, key: str) -> None:
        """Refuse models that do not have the same tensors; the first that differs is named."""
        where = f"{key}.other_path={self.other_path}"
        for name in sorted({*first.file_of, *other.file_of}):
            if name not in other.file_of:
                raise UserError(
                    f"{where}: it has no tensor {name}, which {self.path} has; {EXAMPLE}"
                )
            if name not in first.file_of:
                raise UserError(
                    f"{where}: it has a tensor {name}, which {self.path} does not have; {EXAMPLE}"
                )
            ours, theirs = first.describe(name), other.describe(name)
            if ours.shape != theirs.shape:
                raise UserError(
                    f"{where}: its tensor {name} has the shape {list(theirs.shape)}, that of "
                    f"{self.path} has {list(ours.shape)}; {EXAMPLE}"
                )
            if ours.dtype != theirs.dtype:
                raise UserError(
                    f"{where}: its tensor {name} is of the type {theirs.dtype}, that of "
                    f"{self.path} of {ours.dtype}; expected two models of one type: save one anew "
                    "in the other's"
                )

    def _check_same_config(self, key: str) -> None:
        """Refuse models that would use the same tensors in other ways."""
        if not (_folder(self.other_path) / "config.json").is_file():
            raise UserError(
                f"{key}.other_path={self.other_path}: the folder has no config.json; {EXAMPLE}"
            )
        ours, theirs = (_uses(path) for path in (self.path, self.other_path))
        for name in sorted({*ours, *theirs}):
            if ours.get(name) != theirs.get(name):
                raise UserError(
                    f"{key}.other_path={self.other_path}: its config.json says {name}="
                    f"{theirs.get(name)}, that of {self.path} {ours.get(name)}; {EXAMPLE}"
                )

    def _check_same_tokenizer(self, key: str) -> None:
        """Refuse models that speak of other tokens; a folder without a tokenizer says nothing."""
        paths = {"path": self.path, "other_path": self.other_path}
        if not all(any(_folder(path).glob("tokenizer*")) for path in paths.values()):
            return
        vocabularies = [
            load_tokenizer(str(_folder(path)), key=f"{key}.{name}").get_vocab()
            for name, path in paths.items()
        ]
        if vocabularies[0] != vocabularies[1]:
            raise UserError(
                f"{key}.other_path={self.other_path}: its tokenizer has other tokens than that of "
                f"{self.path}; {EXAMPLE}"
            )

    def _copy_what_is_beside(self, output: Path, *, sharded: bool) -> None:
        folder = _folder(self.path)
        found = {path for pattern in BESIDE for path in folder.glob(pattern) if path.is_file()}
        for path in sorted(found):
            index = path.name.endswith(".index.json") and not (sharded and path.name == INDEX)
            if path.name != MANIFEST and not index:
                shutil.copyfile(path, output / path.name)


def _folder(path: str) -> Path:
    return Path(path).expanduser()


def _uses(path: str) -> dict[str, Any]:
    """Return what a folder's config says of the model, and not of how it was written."""
    said = json.loads((_folder(path) / "config.json").read_text(encoding="utf-8"))
    return {name: value for name, value in said.items() if name not in TELLING}


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
