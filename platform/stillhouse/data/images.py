"""Pictures and points as a LightningDataModule: a source, normalised to unit variance, batches."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.utils import instantiate
from torch import Tensor

from stillhouse.data.language import KeptBatches
from stillhouse.data.pictures.captions import Captions, read_captions
from stillhouse.data.pictures.pictures import Pictures, Samples, Split
from stillhouse.data.stream import BatchStream
from stillhouse.errors import UserError
from stillhouse.ranges import Count, CountFrom0
from stillhouse.records.diffusion import Condition, ImageBatch

# One for all values, or one a channel.
Numbers = float | list[float]


class ImageData(pl.LightningDataModule):
    """Batches of pictures, or of points, with their classes or captions.

    What is read has mean 0 and deviation 1 over all of its values; `mean` and `std` turn it back.
    """

    def __init__(
        self,
        seed: int,
        *,
        source: dict[str, Any],
        captions_path: str | None = None,
        batch_size: Count,
        evaluation_batch_size: Count,
        max_train_samples: Count | None = None,
        max_evaluation_rows: Count | None = None,
        distinct_train_batches: Count | None = None,
        num_workers: CountFrom0 = 0,
        pin_memory: bool = False,
    ) -> None:
        """Describe the data; nothing is read before it is asked for.

        Args:
            seed: of the order of training.
            source: node of a function that returns `Pictures`.
            captions_path: embeddings of its captions, an artifact of the stage `embed_captions`;
                networks are told the captions then, and not the classes. Null leaves captions out.
            batch_size: samples a training batch and device.
            evaluation_batch_size: samples a validation or test batch.
            max_train_samples: train on the first n samples; null takes all.
            max_evaluation_rows: validate and test on n samples; null takes all.
            distinct_train_batches: train on n batches over and over; null takes all.
            num_workers, pin_memory: as in `torch.utils.data.DataLoader`.
        """
        super().__init__()
        self.seed = seed
        self.source_node = source
        self.captions_path = captions_path
        self.batch_size = batch_size
        self.evaluation_batch_size = evaluation_batch_size
        self.max_train_samples = max_train_samples
        self.max_evaluation_rows = max_evaluation_rows
        self.distinct_train_batches = distinct_train_batches
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    @cached_property
    def source(self) -> Pictures:
        """The data set."""
        return instantiate(self.source_node)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes; empty where there are none."""
        return self.source.classes

    @property
    def told_classes(self) -> tuple[str, ...]:
        """Names of the classes that a generator is told; none where it is told captions."""
        return () if self.captions else self.classes

    @cached_property
    def captions(self) -> Captions | None:
        """The embeddings of the captions, where they are told.

        Raises:
            UserError: for a folder without, and for one that lacks a caption of the data.
        """
        if self.captions_path is None:
            return None
        where = f"data.captions_path={self.captions_path}"
        captions = read_captions(self.captions_path, key="data.captions_path")
        for split, samples in self.source.splits.items():
            if samples.captions is None:
                raise UserError(
                    f"{where}: the pictures of {self.source.name} have no captions; expected null"
                )
            missing = captions.missing(samples.captions)
            if missing:
                raise UserError(
                    f"{where}: {len(missing)} captions for {split} are not in it, the first is "
                    f"{missing[0]!r}; embed those of this data"
                )
        return captions

    @cached_property
    def splits(self) -> Mapping[Split, Samples]:
        """What is learnt."""
        return self.source.splits

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W), or (D,) of points."""
        return tuple(self.splits["train"].values.shape[1:])

    @property
    def caption_width(self) -> int:
        """Width of the captions' embeddings; 0 where none are told."""
        return self.captions.width if self.captions else 0

    @cached_property
    def mean(self) -> Numbers:
        """Of all values of training."""
        values = self.splits["train"].values
        return 0.0 if values.ndim == 2 else float(values.mean(dtype=torch.double))

    @cached_property
    def std(self) -> Numbers:
        """Of all values of training."""
        values = self.splits["train"].values
        return 1.0 if values.ndim == 2 else float(values.double().std())

    def samples(self, split: Split) -> Samples:
        """Return the samples of a split that are used, not yet normalised."""
        return self._used(self.splits[split], split)

    def pixels(self, split: Split) -> Tensor:
        """Return the pictures of the samples that are used, from 0 to 1, or the points."""
        return self._used(self.source.splits[split], split).values

    def _used(self, samples: Samples, split: Split) -> Samples:
        most = self.max_train_samples if split == "train" else self.max_evaluation_rows
        return samples if most is None else samples.picked(torch.arange(min(most, len(samples))))

    def normalised(self, values: Tensor) -> Tensor:
        """Return values of mean 0 and deviation 1."""
        mean, std = (_along_channels(numbers, values) for numbers in (self.mean, self.std))
        return (values - mean) / std

    def restored(self, x_0: Tensor) -> Tensor:
        """Return pictures from 0 to 1, or points."""
        mean, std = (_along_channels(numbers, x_0) for numbers in (self.mean, self.std))
        return x_0 * std + mean

    def collate(self, rows: Sequence[int], split: Split = "train") -> ImageBatch:
        """Return a batch of samples by their places."""
        samples = self.splits[split].picked(torch.as_tensor(rows))
        embeddings, mask = None, None
        if self.captions and samples.captions:
            embeddings, mask = self.captions.embedded(samples.captions)
        condition = Condition(samples.labels, embeddings, mask)
        return ImageBatch(self.normalised(samples.values), condition)

    def prepare_data(self) -> None:
        """Read the source, and what its captions are told by.

        Raises:
            UserError: for an empty split.
        """
        _ = self.captions
        for split, samples in self.source.splits.items():
            if not len(samples):
                raise UserError(f"data.source: {self.source.name} has no samples for {split}")

    def train_dataloader(self) -> BatchStream:
        """Return the stream of the whole training; Lightning's trainer says how long it is."""
        return self.stream(Places(len(self.samples("train"))), self.collate)

    def stream(self, places: "Places", collate: Callable[[list[int]], Any]) -> BatchStream:
        """Return a stream of places, gathered into batches by `collate`."""
        trainer = self.trainer
        assert trainer is not None
        if self.distinct_train_batches is not None:
            places = Places(min(len(places), self.distinct_train_batches * self.batch_size))
        return BatchStream(
            places,
            batch_size=self.batch_size,
            num_batches=trainer.max_steps * trainer.accumulate_grad_batches,
            seed=self.seed,
            collate=collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
        )

    def val_dataloader(self) -> KeptBatches[ImageBatch]:
        """Return the validation batches."""
        return KeptBatches(list(self.evaluation_batches("validation")))

    def evaluation_batches(self, split: Split) -> Iterator[ImageBatch]:
        """Yield the samples of a split in their order."""
        places = list(range(len(self.samples(split))))
        size = self.evaluation_batch_size
        for start in range(0, len(places), size):
            yield self.collate(places[start : start + size], split)


def _along_channels(numbers: Numbers, x: Tensor) -> Tensor | float:
    """Return a number, or one a channel, shaped to go with x [B, C, ...]."""
    if isinstance(numbers, float):
        return numbers
    return torch.tensor(numbers, dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 2))


class Places:
    """What a stream draws: places in the data, which a batch gathers at once."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def sample(self, index: int, generator: torch.Generator) -> int:
        """Return the place."""
        return index
