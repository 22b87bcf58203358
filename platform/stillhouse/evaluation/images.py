"""The evaluation of generators of pictures, as `conf/evaluation/images.yaml` names it."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from stillhouse.data.images import ImageData
from stillhouse.errors import UserError
from stillhouse.evaluation.distances import frechet_distance, precision_and_recall
from stillhouse.evaluation.features import Features, Seen
from stillhouse.evaluation.generators import FLOOR, Sampler, drawn, real_samples, samplers
from stillhouse.evaluation.language_models import Evaluated
from stillhouse.ranges import Count, Finite
from stillhouse.records.diffusion import Condition
from stillhouse.tracking.sample_pictures import draw_images

SHOWN = 20
# Of precision and recall; a split has more pictures.
NEIGHBOURS = 3


def images(
    models: Mapping[str, str],
    data: ImageData,
    *,
    features: Features,
    classifier: Features | None,
    guidance_scale: Finite,
    teacher_steps: Sequence[int],
    seed: int,
    speed_repeats: Count,
) -> Evaluated:
    """Compare as many samples as the test split has, of its conditions, with the training data.

    The row `floor` is the test split itself, of as many pictures: what a perfect generator has.

    Args:
        models: role -> path of its pipeline.
        data: the pictures.
        features: in which Frechet distance, precision and recall are taken. They name the distance:
            it is the standard FID in none of them.
        classifier: tells the classes of samples, for `class_consistency`; None takes no notice of
            classes.
        guidance_scale: of a model that is integrated.
        teacher_steps: in how many steps it is.
        seed: of the noise.
        speed_repeats: how often the latency of a single sample is taken.

    Raises:
        UserError: for too few pictures to compare, and for a classifier that tells no classes.
    """
    for split in ("test", "train"):
        count = len(data.samples(split))
        if count <= NEIGHBOURS:
            raise UserError(
                f"data: {count} pictures to {split} are too few to compare; expected "
                f"{NEIGHBOURS + 1} or more, by data.source, data.max_evaluation_rows and "
                "data.max_train_samples"
            )
    rows: dict[str, Sampler] = {}
    for role, path in models.items():
        rows |= samplers(role, path, steps=teacher_steps, guidance_scale=guidance_scale)
    test = real_samples(data, "test")
    reference = features(data.pixels("train")).features
    shown = _shown(test.condition, len(test.x_0))

    def quality(pixels: Tensor) -> dict[str, float]:
        found = _nearness(features(pixels).features, reference)
        if classifier is not None and test.condition.labels is not None:
            found["class_consistency"] = _consistency(classifier(pixels), test.condition.labels)
        return found

    real = data.pixels("test")
    grids = {FLOOR: real[shown].numpy()}
    numbers: dict[str, Mapping[str, float | int]] = {FLOOR: quality(real)}
    for row, sampler in rows.items():
        found = drawn(sampler, data, seed=seed, repeats=speed_repeats)
        pixels = data.restored(found.samples)
        grids[row] = pixels[shown].numpy()
        numbers[row] = {**quality(pixels), **found.cost}
    return Evaluated(models=numbers, pictures={"samples": partial(_draw, grids)})


def _draw(grids: Mapping[str, Any], path: Path) -> Path:
    return draw_images(grids, path)


def _shown(condition: Condition, count: int) -> list[int]:
    """Return places to show: class by class where there are classes."""
    places = list(range(count))
    if condition.labels is not None:
        labels = condition.labels.tolist()
        seen: dict[int, int] = {}
        turn = []
        for place in places:
            turn.append(seen.setdefault(labels[place], 0))
            seen[labels[place]] += 1
        places = sorted(places, key=lambda place: (turn[place], labels[place]))
    return places[:SHOWN]


def _nearness(features: Float[Tensor, "N D"], reference: Float[Tensor, "M D"]) -> dict[str, float]:
    """Return how near features are to the reference's."""
    precision, recall = precision_and_recall(features, reference, neighbours=NEIGHBOURS)
    return {
        "frechet_distance": frechet_distance(features, reference),
        "precision": precision,
        "recall": recall,
    }


def _consistency(seen: Seen, labels: Int[Tensor, "N"]) -> float:
    """Return the share of samples that are seen as what was asked for."""
    if seen.logits is None:
        raise UserError(
            "evaluation.classifier: this network tells no classes of the data; expected "
            "stillhouse.evaluation.features.classifier, or null for no class_consistency"
        )
    return float((seen.logits.argmax(1) == labels).double().mean())
