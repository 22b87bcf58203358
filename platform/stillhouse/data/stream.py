"""A training loader whose every batch is a pure function of (seed, position).

The stream is the whole training of a stage: batch n holds the next samples of an endless sequence
of epochs, each a permutation that (seed, epoch) decides, and a sample's own randomness is decided
by (seed, epoch, index). Going on from batch n therefore needs no replay, whatever the number of
workers, and an epoch's end is no special case for whoever trains.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

SampleKey = tuple[int, int]


@runtime_checkable
class SampleSource(Protocol):
    """A sized collection of samples, each drawn with its own generator."""

    def __len__(self) -> int: ...

    def sample(self, index: int, generator: torch.Generator) -> Any:
        """Return sample `index`; `generator` is the only source of randomness."""
        ...


def generator_for(*numbers: int) -> torch.Generator:
    """Return a generator that the numbers decide; neighbours are unrelated."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


class BatchStream:
    """An iterable of batches with a length and a position that can be saved.

    Lightning calls `state_dict` when it writes a checkpoint: the position counts the batches that
    were handed to training, not those that workers have fetched ahead.
    """

    def __init__(
        self,
        source: SampleSource,
        *,
        batch_size: int,
        num_batches: int,
        seed: int,
        collate: Callable[[list[Any]], Any],
        num_workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Make a stream of `num_batches` batches of `batch_size` samples for this rank.

        Args:
            source: where samples come from.
            batch_size: samples a batch and rank.
            num_batches: length of the whole training, in batches of one rank.
            seed: of order and samples.
            collate: from a list of samples to a batch.
            num_workers: processes that fetch ahead; they change nothing about the batches.
            pin_memory: as in `torch.utils.data.DataLoader`.
            rank, world_size: each rank gets its own slice of every global batch.
        """
        self.source = source
        self.batch_size = batch_size
        self.num_batches = num_batches
        self.seed = seed
        self.collate = collate
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.rank = rank
        self.world_size = world_size
        self.position = 0
        self._order: tuple[int, Sequence[int]] = (-1, ())

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Any]:
        loader = DataLoader(
            _KeyedDataset(self.source, self.seed),
            batch_sampler=_RemainingKeys(self),
            collate_fn=self.collate,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator(),
        )
        for batch in loader:
            self.position += 1
            yield batch

    def keys(self, batch: int) -> list[SampleKey]:
        """Return the (epoch, index) of every sample of this rank's batch."""
        first = (batch * self.world_size + self.rank) * self.batch_size
        return [self._key(first + offset) for offset in range(self.batch_size)]

    def _key(self, position: int) -> SampleKey:
        epoch, place = divmod(position, len(self.source))
        if self._order[0] != epoch:
            generator = generator_for(self.seed, epoch)
            order = torch.randperm(len(self.source), generator=generator).tolist()
            self._order = (epoch, order)
        return epoch, self._order[1][place]

    def state_dict(self) -> dict[str, int]:
        """Return the number of batches trained."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on behind the batches already trained."""
        self.position = state["position"]


class _KeyedDataset(Dataset[Any]):
    def __init__(self, source: SampleSource, seed: int) -> None:
        self.source, self.seed = source, seed

    def __getitem__(self, key: SampleKey) -> Any:
        epoch, index = key
        return self.source.sample(index, generator_for(self.seed, epoch, index))


class _RemainingKeys(Sampler[list[SampleKey]]):
    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __len__(self) -> int:
        return self.stream.num_batches - self.stream.position

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for batch in range(self.stream.position, self.stream.num_batches):
            yield self.stream.keys(batch)
