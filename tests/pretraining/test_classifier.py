"""The classifier of pictures: how they are moved, what a step learns, what is validated."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from generators import DIGITS, POINTS, data_of
from torch import Tensor
from training import bare_trainer, plain_sgd

from stillhouse.data.stream import generator_for
from stillhouse.errors import UserError
from stillhouse.pretraining.classifier import ImageClassifier, shifted
from stillhouse.students.classifiers import SmallClassifier, small_classifier


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [generator_for(seed, row) for row in range(count)]


@pytest.mark.parametrize("pixels", [0, 1, 2])
def test_a_picture_moves_by_so_many_pixels_at_most(pixels: int) -> None:
    """Every move is found, none is further, and a border is what it was next to."""
    height, width = 7, 9
    places = torch.arange(height * width).view(1, 1, height, width).double()
    count = 400
    moved = shifted(places.repeat(count, 2, 1, 1), generators(count), pixels=pixels)
    assert moved.shape == (count, 2, height, width)
    rows, columns = torch.arange(height), torch.arange(width)
    seen: set[tuple[int, int]] = set()
    for picture in moved:
        top, left = divmod(int(picture[0, 3, 4]), width)
        down, right = top - 3, left - 4
        seen.add((down, right))
        inside = (rows + down).clamp(0, height - 1)[:, None] * width
        expected = inside + (columns + right).clamp(0, width - 1)
        assert torch.equal(picture, expected.double().expand(2, -1, -1))
    allowed = range(-pixels, pixels + 1)
    assert seen == {(down, right) for down in allowed for right in allowed}


def test_a_picture_moves_alike_in_any_batch() -> None:
    values = torch.randn(5, 1, 6, 6)
    together = shifted(values, generators(5), pixels=2)
    alone = shifted(values[3:4], generators(5)[3:4], pixels=2)
    assert torch.equal(together[3:4], alone)


def classifier(seed: int = 0) -> SmallClassifier:
    torch.manual_seed(seed)
    return small_classifier(data_of(DIGITS), width=4, feature_width=6)


def unmoved(values: Tensor, generators: Any) -> Tensor:
    return values


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_the_gradient_of_the_mean_over_the_window(tmp_path, accumulate: int) -> None:
    module = ImageClassifier(classifier(), None, unmoved, plain_sgd)
    data = data_of(DIGITS)
    options = {"max_steps": 1, "accumulate_grad_batches": accumulate, "limit_val_batches": 0}
    bare_trainer(tmp_path, **options).fit(module, datamodule=data)
    reference = classifier()
    stream = data.train_dataloader()
    batch = data.collate([place for n in range(accumulate) for _, place in stream.keys(n)])
    assert batch.condition.labels is not None
    loss = F.cross_entropy(reference(batch.x_0).logits, batch.condition.labels)
    loss.backward()
    with torch.no_grad():
        for parameter in reference.parameters():
            assert parameter.grad is not None
            parameter -= parameter.grad
    torch.testing.assert_close(module.student.state_dict(), reference.state_dict())
    assert module.summary()["images_seen"] == 4 * accumulate
    assert module.summary()["train_loss"] == pytest.approx(loss.item())


def test_validation_is_the_share_that_is_told_right(tmp_path) -> None:
    module = ImageClassifier(classifier(), None, unmoved, plain_sgd)
    data = data_of(DIGITS)
    # Batches of 5, 5, 5, 5 and one of 3 count by their pictures.
    data.max_evaluation_rows = 18
    (found,) = bare_trainer(tmp_path).validate(module, datamodule=data, verbose=False)
    whole = data.collate(range(18), "validation")
    right = module.student(whole.x_0).logits.argmax(1) == whole.condition.labels
    assert found["val_accuracy"] == pytest.approx(float(right.double().mean()))
    assert 0 < found["val_accuracy"] < 1


def test_what_is_exported_is_the_same_classifier(tmp_path) -> None:
    module, data = ImageClassifier(classifier(), None, unmoved, plain_sgd), data_of(DIGITS)
    module.export(tmp_path, data)
    loaded: Any = SmallClassifier.from_pretrained(tmp_path)
    x = data.collate(range(6)).x_0
    torch.testing.assert_close(loaded(x).logits, module.student(x).logits)
    assert (loaded.config["mean"], loaded.config["std"]) == (data.mean, data.std)


def test_a_teacher_is_refused() -> None:
    with pytest.raises(UserError) as refusal:
        ImageClassifier(classifier(), classifier(), unmoved, plain_sgd)
    assert str(refusal.value) == (
        "teacher: labels alone are learnt from here; expected teacher=null"
    )


def test_points_are_refused() -> None:
    with pytest.raises(UserError) as refusal:
        small_classifier(data_of(POINTS), width=4, feature_width=6)
    assert str(refusal.value) == (
        "student: a classifier needs pictures with classes; expected data=digits, or another "
        "source with labels"
    )
