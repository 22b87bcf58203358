import random

import lightning.pytorch as pl
import pytest
import torch

from stillhouse.data.stream import BatchStream


class Draws:
    """A source whose samples say which they are and what their generator drew."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def sample(self, index: int, generator: torch.Generator) -> tuple[int, int]:
        return index, int(torch.randint(2**62, (), generator=generator))


def stream(size: int = 10, **changes) -> BatchStream:
    options = {"batch_size": 3, "num_batches": 9, "seed": 7, "collate": list}
    return BatchStream(Draws(size), **(options | changes))


def test_every_epoch_is_a_permutation_of_its_own():
    drawn = [key for batch in range(10) for key in stream(num_batches=10).keys(batch)]
    epochs = [[index for epoch, index in drawn if epoch == number] for number in range(3)]
    assert [epoch for epoch, _ in drawn] == sorted(epoch for epoch, _ in drawn)
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_are_a_pure_function_of_seed_and_position():
    straight = {n: stream().keys(n) for n in range(9)}
    torch.manual_seed(0)
    back_and_forth, order = stream(), list(range(9))
    random.Random(0).shuffle(order)
    assert {n: back_and_forth.keys(n) for n in order} == straight
    assert [stream(seed=8).keys(n) for n in range(9)] != [straight[n] for n in range(9)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_is_repeatable_and_leaves_the_global_generator_alone(num_workers):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = list(stream(num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert list(stream(num_workers=num_workers)) == first
    assert len(first) == len(stream()) == 9


def test_workers_change_nothing_about_the_batches():
    assert list(stream(num_workers=2)) == list(stream(num_workers=0))


@pytest.mark.parametrize("taken", [0, 1, 4, 9])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_goes_on_behind_the_batches_taken_not_those_fetched_ahead(num_workers, taken):
    whole = list(stream())
    interrupted = stream(num_workers=num_workers)
    batches = iter(interrupted)
    assert [next(batches) for _ in range(taken)] == whole[:taken]
    state = interrupted.state_dict()

    resumed = stream(num_workers=num_workers)
    resumed.load_state_dict(state)
    assert len(resumed) == 9, "the length is that of the whole training"
    assert list(resumed) == whole[taken:]
    assert state == {"position": taken}
    assert resumed.state_dict() == {"position": 9}


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_partition_every_global_batch(world_size):
    ranks = [stream(rank=rank, world_size=world_size) for rank in range(world_size)]
    alone = stream(batch_size=3 * world_size)
    for n in range(9):
        together = [key for rank in ranks for key in rank.keys(n)]
        assert together == alone.keys(n)
        # Positions are drawn without replacement, over an epoch's end too.
        assert len(set(together)) == 3 * world_size


def draws_by_key(read: BatchStream) -> dict[tuple[int, int], int]:
    drawn = {}
    for n, batch in enumerate(read):
        drawn |= {key: draw for key, (_, draw) in zip(read.keys(n), batch, strict=True)}
    return drawn


def test_sample_randomness_is_decided_by_seed_epoch_and_index_alone():
    draws = draws_by_key(stream())
    assert len(draws) == 27
    assert len(set(draws.values())) == 27, "two epochs or two indices share their randomness"
    assert draws_by_key(stream(batch_size=9, num_batches=3)) == draws
    assert not set(draws_by_key(stream(seed=8)).values()) & set(draws.values())


def test_epoch_shorter_than_a_batch_goes_round():
    (batch,) = stream(size=2, batch_size=5, num_batches=1)
    assert sorted(index for index, _ in batch[:2]) == sorted(index for index, _ in batch[2:4])
    assert len({draw for _, draw in batch}) == 5


class Reader(pl.LightningModule):
    """A module that only notes what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch)
        return self.weight * 0

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SaveAtStep4(pl.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 4:
            trainer.save_checkpoint(f"{trainer.default_root_dir}/at_4.ckpt")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_lightning_goes_on_with_the_batch_after_the_checkpoint(num_workers, tmp_path):
    def train(ckpt_path=None):
        trainer = pl.Trainer(
            max_steps=9,
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[] if ckpt_path else [SaveAtStep4()],
        )
        reader = Reader()
        loader = stream(num_workers=num_workers, collate=torch.tensor)
        trainer.fit(reader, loader, ckpt_path=ckpt_path, weights_only=True)
        return reader.seen

    uninterrupted = train()
    assert len(uninterrupted) == 9
    torch.testing.assert_close(train(tmp_path / "at_4.ckpt"), uninterrupted[4:])
