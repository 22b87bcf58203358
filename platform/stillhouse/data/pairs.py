"""Recorded pairs of noise and sample, addressed by a seed: noise is drawn again, samples are kept.

Noise i of a store is a pure function of (seed, i). Beside the samples stand their conditions and
what made them, by which a store of another teacher is told.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.data.images import ImageData, Places
from stillhouse.data.stream import BatchStream, generator_for
from stillhouse.errors import UserError
from stillhouse.files import content_hash, write_json
from stillhouse.ranges import Count, CountFrom0
from stillhouse.records.diffusion import Condition, PairBatch

SAMPLES, FACTS = "pairs.safetensors", "pairs.json"


@dataclass(frozen=True)
class PairFacts:
    """What a store was made of.

    Attributes:
        teacher: hash of its folder.
        seed: of the noise.
        steps: of the solver.
        guidance_scale: of the teacher.
    """

    teacher: str
    seed: int
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Pairs:
    """A store.

    Attributes:
        facts: what it was made of.
        x_0: the samples.
        condition: of each.
    """

    facts: PairFacts
    x_0: Float[Tensor, "N ..."]
    condition: Condition

    def write(self, folder: Path) -> None:
        """Write the store."""
        fields = {name: t for name, t in self.condition._asdict().items() if t is not None}
        save_file({"x_0": self.x_0.contiguous(), **fields}, folder / SAMPLES)
        write_json(folder / FACTS, asdict(self.facts))


def read_pairs(path: str, *, key: str) -> Pairs:
    """Return the store in a folder.

    Raises:
        UserError: for a folder without one.
    """
    folder = Path(path).expanduser()
    try:
        facts = PairFacts(**json.loads((folder / FACTS).read_text()))
        tensors = load_file(folder / SAMPLES)
        return Pairs(facts, tensors.pop("x_0"), Condition(**tensors))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"{key}={path}: no pairs can be read there; expected the artifact of a stage of "
            "conf/stage/record_pairs.yaml"
        ) from error


def noise_of(seed: int, places: Sequence[int], shape: Sequence[int]) -> Float[Tensor, "B ..."]:
    """Return the noise of some pairs, float32."""
    return torch.stack([torch.randn(*shape, generator=generator_for(seed, i)) for i in places])


class PairData(ImageData):
    """Trains on recorded pairs; validates and tests on the pictures that they are like."""

    def __init__(
        self,
        seed: int,
        *,
        pairs_path: str,
        teacher_path: str,
        source: dict[str, Any],
        captions_path: str | None = None,
        batch_size: Count,
        evaluation_batch_size: Count,
        max_evaluation_rows: Count | None = None,
        distinct_train_batches: Count | None = None,
        num_workers: CountFrom0 = 0,
        pin_memory: bool = False,
    ) -> None:
        """Describe the data; nothing is read before it is asked for.

        Args:
            seed: of the order of training.
            pairs_path: the store's folder.
            teacher_path: the model that has to have made it.
            source, captions_path, batch_size, evaluation_batch_size, max_evaluation_rows,
                distinct_train_batches, num_workers, pin_memory: as in `ImageData`.
        """
        super().__init__(
            seed,
            source=source,
            captions_path=captions_path,
            batch_size=batch_size,
            evaluation_batch_size=evaluation_batch_size,
            max_evaluation_rows=max_evaluation_rows,
            distinct_train_batches=distinct_train_batches,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
        self.pairs_path = pairs_path
        self.teacher_path = teacher_path

    @cached_property
    def pairs(self) -> Pairs:
        """The store.

        Raises:
            UserError: for one that another teacher made, or of samples of another shape.
        """
        found = read_pairs(self.pairs_path, key="data.pairs_path")
        if found.facts.teacher != content_hash(Path(self.teacher_path).expanduser()):
            raise UserError(
                f"data.pairs_path={self.pairs_path}: another teacher made these pairs than "
                f"data.teacher_path={self.teacher_path}; record them anew, or name their own"
            )
        if tuple(found.x_0.shape[1:]) != self.image_shape:
            raise UserError(
                f"data.pairs_path={self.pairs_path}: its samples have the shape "
                f"{tuple(found.x_0.shape[1:])}, the pictures of data {self.image_shape}"
            )
        return found

    def prepare_data(self) -> None:
        """Read the pictures and the pairs."""
        super().prepare_data()
        assert self.pairs

    def collate_pairs(self, rows: Sequence[int]) -> PairBatch:
        """Return a batch of pairs by their places."""
        pairs, places = self.pairs, torch.as_tensor(rows)
        condition = Condition(*(t if t is None else t[places] for t in pairs.condition))
        noise = noise_of(pairs.facts.seed, rows, self.image_shape)
        return PairBatch(noise, pairs.x_0[places].float(), condition)

    def train_dataloader(self) -> BatchStream:
        """Return the stream of the whole training."""
        return self.stream(Places(len(self.pairs.x_0)), self.collate_pairs)

    def report(self) -> Mapping[str, int]:
        """Return how many pairs there are."""
        return {"pairs": len(self.pairs.x_0)}

    def remarks(self) -> Sequence[str]:
        """Say nothing."""
        return []
