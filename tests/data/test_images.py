"""Pictures and points as batches: normalised, cut, in the stream's order, and told when empty."""

import pytest
import torch
from generators import DIGITS, POINTS, data_of
from training import bare_trainer

from stillhouse.data.images import ImageData
from stillhouse.data.stream import BatchStream
from stillhouse.errors import UserError
from stillhouse.records.diffusion import ImageBatch


def stream_of(data: ImageData, tmp_path, steps: int = 9, **options) -> BatchStream:
    data.trainer = bare_trainer(tmp_path, max_steps=steps, **options)
    return data.train_dataloader()


def test_pictures_are_normalised_by_the_training_values() -> None:
    """Mean 0 and deviation 1 over all of them, and not over those of another split."""
    data = data_of(DIGITS)
    values = data.source.splits["train"].values
    x_0 = data.normalised(values).double()
    assert abs(float(x_0.mean())) < 1e-6
    assert float(x_0.std()) == pytest.approx(1, abs=1e-6)
    assert abs(float(data.normalised(data.source.splits["test"].values).mean())) > 1e-4
    torch.testing.assert_close(data.restored(data.normalised(values)), values)
    assert abs(data.mean) > 0.1
    assert data.image_shape == (1, 8, 8)


def test_fewer_samples_are_normalised_alike() -> None:
    """A teacher of all samples and a student of a few speak of the same values."""
    few, all_of_them = data_of(DIGITS, max_train_samples=3), data_of(DIGITS)
    assert (few.mean, few.std) == (all_of_them.mean, all_of_them.std)


def test_points_are_left_as_they_are() -> None:
    data = data_of(POINTS)
    points = data.source.splits["train"].values
    assert torch.equal(data.collate(range(50)).x_0, points)
    assert torch.equal(data.restored(points), points)
    assert data.image_shape == (2,)
    assert data.classes == ("0", "1", "2", "3")


def test_a_batch_is_the_samples_of_its_places_with_their_labels(tmp_path) -> None:
    data = data_of(DIGITS)
    stream = stream_of(data, tmp_path)
    samples = data.source.splits["train"]
    assert samples.labels is not None
    batches: list[ImageBatch] = list(stream)
    assert len(batches) == 9
    for number, batch in enumerate(batches):
        places = torch.tensor([index for _, index in stream.keys(number)])
        assert len(places) == 4
        assert torch.equal(batch.x_0, data.normalised(samples.values[places]))
        assert batch.condition.labels is not None
        assert torch.equal(batch.condition.labels, samples.labels[places])


def test_an_accumulated_training_is_as_much_longer(tmp_path) -> None:
    assert len(stream_of(data_of(DIGITS), tmp_path, accumulate_grad_batches=3)) == 27


def test_every_sample_comes_once_an_epoch(tmp_path) -> None:
    stream = stream_of(data_of(POINTS, batch_size=5), tmp_path, steps=20)
    keys = [key for number in range(20) for key in stream.keys(number)]
    for epoch in range(2):
        assert sorted(i for e, i in keys if e == epoch) == list(range(50))


def places_of(stream: BatchStream) -> list[int]:
    return [i for number in range(len(stream)) for _, i in stream.keys(number)]


def test_the_first_samples_alone(tmp_path) -> None:
    stream = stream_of(data_of(DIGITS, max_train_samples=6), tmp_path)
    assert set(places_of(stream)) == set(range(6))
    data = data_of(DIGITS, max_train_samples=10_000)
    assert len(data.samples("train")) == 1797 - 50


def test_a_few_batches_over_and_over(tmp_path) -> None:
    stream = stream_of(data_of(DIGITS, distinct_train_batches=2), tmp_path)
    assert set(places_of(stream)) == set(range(8))
    few = data_of(DIGITS, distinct_train_batches=5, max_train_samples=6)
    assert set(places_of(stream_of(few, tmp_path))) == set(range(6)), "no more than there are"


def test_evaluation_takes_its_samples_in_order_and_once() -> None:
    data = data_of(DIGITS, max_evaluation_rows=13)
    for split in ("validation", "test"):
        batches = list(data.evaluation_batches(split))
        assert [len(batch.x_0) for batch in batches] == [5, 5, 3]
        found = torch.cat([batch.x_0 for batch in batches])
        samples = data.source.splits[split]
        assert torch.equal(found, data.normalised(samples.values[:13]))
        labels = [batch.condition.labels for batch in batches]
        assert samples.labels is not None
        assert torch.equal(torch.cat([t for t in labels if t is not None]), samples.labels[:13])
    assert len(data.samples("train")) == 1797 - 50, "training is not cut by it"
    assert sum(len(batch.x_0) for batch in data.val_dataloader()) == 13


def test_a_stream_goes_on_at_its_position(tmp_path) -> None:
    data = data_of(DIGITS)
    whole = list(stream_of(data, tmp_path))
    began = stream_of(data, tmp_path)
    taken = iter(began)
    for _ in range(4):
        next(taken)
    resumed = stream_of(data, tmp_path)
    resumed.load_state_dict(began.state_dict())
    rest = list(resumed)
    assert len(rest) == 5
    for ours, theirs in zip(rest, whole[4:], strict=True):
        assert torch.equal(ours.x_0, theirs.x_0)
    assert not torch.equal(rest[0].x_0, whole[0].x_0)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_an_empty_split_is_refused(split: str) -> None:
    with pytest.raises(UserError) as refusal:
        data_of({"_target_": "generators.lacking", "split": split}).prepare_data()
    assert str(refusal.value) == f"data.source: a folder has no samples for {split}"
