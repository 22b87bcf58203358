"""Recorded pairs as training data: noise beside its sample, and stores that do not belong."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import DIGITS, POINTS, data_of, digit_generator, point_generator, saved
from safetensors.torch import load_file, save_file
from training import bare_trainer

from stillhouse.data.pairs import PairData, PairFacts, Pairs, noise_of, read_pairs
from stillhouse.errors import UserError
from stillhouse.files import content_hash
from stillhouse.records.diffusion import Condition

COUNT, SEED = 11, 5


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return saved(point_generator(), tmp_path / "teacher", POINTS)


@pytest.fixture
def store(tmp_path: Path, teacher: str) -> Path:
    """A store whose sample is twice its noise, and whose label is its place mod 4."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    facts = PairFacts(content_hash(Path(teacher)), seed=SEED, steps=3, guidance_scale=1.0)
    x_0 = 2 * noise_of(SEED, range(COUNT), (2,))
    Pairs(facts, x_0, Condition(labels=torch.arange(COUNT) % 4)).write(folder)
    return folder


def pair_data(store: Path | str, teacher: str, source: Any = POINTS, **changes: Any) -> PairData:
    sizes = {"batch_size": 4, "evaluation_batch_size": 5}
    paths = {"pairs_path": str(store), "teacher_path": teacher}
    return PairData(0, source=source, **paths, **(sizes | changes))


def refusal_of(data: PairData) -> str:
    with pytest.raises(UserError) as refusal:
        data.prepare_data()
    return str(refusal.value)


def test_what_is_written_is_read(store: Path) -> None:
    found = read_pairs(str(store), key="data.pairs_path")
    assert found.facts.seed == SEED
    assert (found.facts.steps, found.facts.guidance_scale) == (3, 1.0)
    assert torch.equal(found.x_0, 2 * noise_of(SEED, range(COUNT), (2,)))
    assert found.condition.labels is not None
    assert found.condition.labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]
    assert found.condition.embeddings is found.condition.mask is None


@pytest.mark.parametrize("workers", [0, 2])
def test_noise_stands_beside_its_own_sample_and_label(tmp_path, store, teacher, workers) -> None:
    """Whoever draws it: the noise is drawn anew in every epoch, in whatever order."""
    data = pair_data(store, teacher, num_workers=workers)
    data.prepare_data()
    data.trainer = bare_trainer(tmp_path, max_steps=6)
    stream = data.train_dataloader()
    seen: list[int] = []
    for number, batch in enumerate(stream):
        places = torch.tensor([place for _, place in stream.keys(number)])
        seen += places.tolist()
        assert torch.equal(batch.x_0, 2 * batch.noise)
        assert torch.equal(batch.noise, noise_of(SEED, places.tolist(), (2,)))
        assert torch.equal(batch.condition.labels, places % 4)
    assert set(seen) == set(range(COUNT))
    assert data.report() == {"pairs": COUNT}


def test_a_few_batches_of_pairs(tmp_path, store, teacher) -> None:
    data = pair_data(store, teacher, distinct_train_batches=1)
    data.trainer = bare_trainer(tmp_path, max_steps=5)
    stream = data.train_dataloader()
    assert {place for n in range(5) for _, place in stream.keys(n)} == set(range(4))


def test_validation_is_of_the_pictures(store, teacher) -> None:
    data, pictures = pair_data(store, teacher), data_of(POINTS)
    for ours, theirs in zip(data.val_dataloader(), pictures.val_dataloader(), strict=True):
        assert torch.equal(ours.x_0, theirs.x_0)


def test_a_store_of_another_teacher(tmp_path, store) -> None:
    other = saved(point_generator(seed=2), tmp_path / "other", POINTS)
    assert refusal_of(pair_data(store, other)) == (
        f"data.pairs_path={store}: another teacher made these pairs than data.teacher_path={other}"
        "; record them anew, or name their own"
    )


def test_a_store_of_another_shape(tmp_path, store) -> None:
    digits = saved(digit_generator(), tmp_path / "digits", DIGITS)
    facts = json.loads((store / "pairs.json").read_text())
    facts["teacher"] = content_hash(Path(digits))
    (store / "pairs.json").write_text(json.dumps(facts))
    assert refusal_of(pair_data(store, digits, DIGITS)) == (
        f"data.pairs_path={store}: its samples have the shape (2,), the pictures of data (1, 8, 8)"
    )


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def without_samples(file: Path) -> None:
    tensors = load_file(file)
    del tensors["x_0"]
    save_file(tensors, file)


def of_other_facts(file: Path) -> None:
    file.write_text(json.dumps({"teacher": "a", "seed": 0}))


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("pairs.json", Path.unlink),
        ("pairs.json", cut),
        ("pairs.json", of_other_facts),
        ("pairs.safetensors", Path.unlink),
        ("pairs.safetensors", cut),
        ("pairs.safetensors", without_samples),
    ],
)
def test_a_folder_without_a_whole_store(store, teacher, name: str, spoil) -> None:
    spoil(store / name)
    assert refusal_of(pair_data(store, teacher)) == (
        f"data.pairs_path={store}: no pairs can be read there; expected the artifact of a stage of "
        "conf/stage/record_pairs.yaml"
    )
