"""The evaluation of pictures: rows, the floor, class consistency, and the picture beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from generators import DIGITS, data_of, digit_generator, saved
from PIL import Image
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.evaluation import images as module
from stillhouse.evaluation.features import Seen, classifier
from stillhouse.evaluation.generators import Drawn, Sampler
from stillhouse.evaluation.images import SHOWN, images
from stillhouse.evaluation.language_models import Evaluated
from stillhouse.records.diffusion import Condition
from stillhouse.students.classifiers import small_classifier

QUALITY = {"frechet_distance", "precision", "recall"}


def halves(pixels: Tensor) -> Seen:
    """Features: the means of quarters. Logits: 1 for the digit 3, whatever the picture."""
    logits = torch.zeros(len(pixels), 10)
    logits[:, 3] = 1
    return Seen(torch.nn.functional.avg_pool2d(pixels, 4).flatten(1), logits)


def blind(pixels: Tensor) -> Seen:
    """Features alone."""
    return Seen(halves(pixels).features, None)


def evaluated(
    models: dict[str, str], features: Any = blind, classifier: Any = halves, **changes: Any
) -> Evaluated:
    settings = {"guidance_scale": 2.0, "teacher_steps": [3, 1], "seed": 0, "speed_repeats": 1}
    data = data_of(DIGITS, max_train_samples=200)
    return images(models, data, features=features, classifier=classifier, **(settings | changes))


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    return {
        "teacher": saved(digit_generator(), tmp_path / "teacher", DIGITS),
        "student": saved(digit_generator(2), tmp_path / "student", DIGITS, {"1": [1.5708]}),
    }


def test_rows_and_numbers(models) -> None:
    found = evaluated(models).models
    assert list(found) == ["floor", "teacher@3", "teacher@1", "student@1"]
    assert found["floor"].keys() == QUALITY | {"class_consistency"}
    cost = {"network_calls", "parameters", "latency_ms"}
    assert found["student@1"].keys() == QUALITY | {"class_consistency"} | cost
    assert [found[row]["network_calls"] for row in list(found)[1:]] == [6, 2, 1]


def test_the_class_that_is_seen_is_the_class_that_was_asked_for() -> None:
    """A network that sees threes everywhere is right about the test split's share of threes."""
    data = data_of(DIGITS)
    labels = data.source.splits["test"].labels
    assert labels is not None
    found = evaluated({}).models["floor"]["class_consistency"]
    assert found == pytest.approx(float((labels == 3).double().mean()))
    assert 0 < found < 1


def test_classes_may_be_left_alone() -> None:
    assert evaluated({}, classifier=None).models["floor"].keys() == QUALITY
    # Features that tell classes are not asked for them.
    assert evaluated({}, halves, None).models["floor"].keys() == QUALITY


def test_a_network_without_classes_is_no_classifier() -> None:
    with pytest.raises(UserError) as refusal:
        evaluated({}, classifier=blind)
    assert str(refusal.value) == (
        "evaluation.classifier: this network tells no classes of the data; expected "
        "stillhouse.evaluation.features.classifier, or null for no class_consistency"
    )


class Real:
    """Stands in for `drawn`: training pictures of the classes asked for, as a perfect one draws."""

    def __init__(self, noise: float) -> None:
        self.noise = noise

    def __call__(self, sampler: Sampler, data: Any, *, seed: int, repeats: int) -> Drawn:
        samples = data.source.splits["train"]
        used = data.source.splits["test"].labels
        places = [
            int((samples.labels == label).nonzero()[number]) for number, label in enumerate(used)
        ]
        x_0 = data.normalised(samples.values[places])
        generator = torch.Generator().manual_seed(seed)
        return Drawn(x_0 + self.noise * torch.randn(x_0.shape, generator=generator), sampler.cost)


def test_a_perfect_generator_is_at_the_floor(models, monkeypatch) -> None:
    rows: dict[float, Any] = {}
    for noise in (0.0, 1.0):
        monkeypatch.setattr(module, "drawn", Real(noise))
        rows[noise] = evaluated(models).models
    floor = rows[0.0]["floor"]
    assert floor["frechet_distance"] > 0
    assert rows[0.0]["student@1"]["frechet_distance"] < 2 * floor["frechet_distance"]
    assert rows[0.0]["student@1"]["precision"] > 0.8
    assert rows[1.0]["student@1"]["frechet_distance"] > 2 * floor["frechet_distance"]
    assert rows[1.0]["student@1"]["precision"] < 0.8


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_evaluation_rows": 3}, "3 pictures to test"),
        ({"max_train_samples": 2}, "2 pictures to train"),
    ],
)
def test_too_few_pictures_are_refused(changes: dict[str, int], said: str) -> None:
    settings = {
        "features": halves,
        "classifier": None,
        "guidance_scale": 1.0,
        "teacher_steps": [1],
        "seed": 0,
    }
    with pytest.raises(UserError) as refusal:
        images({}, data_of(DIGITS, **changes), **settings, speed_repeats=1)
    assert str(refusal.value) == (
        f"data: {said} are too few to compare; expected 4 or more, by data.source, "
        "data.max_evaluation_rows and data.max_train_samples"
    )
    enough = data_of(DIGITS, max_evaluation_rows=4, max_train_samples=4)
    assert images({}, enough, **settings, speed_repeats=1).models


def test_features_are_of_pixels_and_distances_to_training(models) -> None:
    """As stored, from 0 to 1, and not as the networks read them."""
    seen: list[Tensor] = []

    def kept(pixels: Tensor) -> Seen:
        seen.append(pixels)
        return halves(pixels)

    evaluated(models, kept)
    data = data_of(DIGITS)
    assert len(seen) == 1 + 1 + 3
    torch.testing.assert_close(seen[0], data.source.splits["train"].values[:200])
    torch.testing.assert_close(seen[1], data.source.splits["test"].values)


def test_pictures_are_shown_class_by_class() -> None:
    labels = torch.tensor([1, 0, 1, 2, 0, 1])
    assert module._shown(Condition(labels=labels), 6) == [1, 0, 3, 4, 2, 5]
    assert module._shown(Condition(), 30) == list(range(SHOWN))


def test_the_picture_is_written(models, tmp_path: Path) -> None:
    draw = evaluated(models).pictures["samples"]
    file = draw(tmp_path / "samples.png")
    with Image.open(file) as picture:
        grey = picture.convert("L").getcolors(100_000)
        assert picture.size[0] > 2 * picture.size[1]
    assert grey is not None
    # Digits have 17 shades; the margins are white.
    assert len(grey) > 17


def test_a_classifier_sees_what_it_was_trained_on(tmp_path: Path) -> None:
    """Pixels outside of 0 to 1 as pictures hold them, normalised as in its training, in batches."""
    torch.manual_seed(0)
    data = data_of(DIGITS)
    network = small_classifier(data, width=4, feature_width=6).eval()
    network.save_pretrained(tmp_path)
    pixels = 1.4 * data.source.splits["train"].values[:700] - 0.2
    seen = classifier(path=str(tmp_path))(pixels)
    with torch.no_grad():
        said = network(data.normalised(pixels.clamp(0, 1)))
    torch.testing.assert_close(seen.features, said.features)
    torch.testing.assert_close(seen.logits, said.logits)


def test_a_folder_without_a_classifier(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        classifier(path=str(tmp_path))
    assert str(refusal.value) == (
        f"evaluation.classifier.path or evaluation.features.path={tmp_path}: there is no "
        "classifier; expected the artifact of a stage of conf/stage/classifier.yaml"
    )
