"""The evaluation of generators of pictures, as `conf/evaluation/images.yaml` names it."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
        features: of `evaluation.features`, in which distances are taken: they are not the standard
            FID's.
        guidance_scale: of a model that is integrated.
        teacher_steps: in how many steps it is.
        seed: of the noise.
        speed_repeats: how often the latency of a single sample is taken.

    Raises:
        UserError: for too few pictures to compare.
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
    reference = features(data.restored(real_samples(data, "train").x_0))
    shown = _shown(test.condition, len(test.x_0))
    pixels = {FLOOR: data.restored(test.x_0)}
    numbers: dict[str, Mapping[str, float | int]] = {
        FLOOR: _quality(features(pixels[FLOOR]), test.condition, reference)
    }
    for row, sampler in rows.items():
        found = drawn(sampler, data, seed=seed, repeats=speed_repeats)
        pixels[row] = data.restored(found.samples)
        quality = _quality(features(pixels[row]), test.condition, reference)
        numbers[row] = {**quality, **found.cost}
    grids = {row: values[shown].numpy() for row, values in pixels.items()}
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


def _quality(seen: Seen, condition: Condition, reference: Seen) -> dict[str, float]:
    """Return a row's numbers."""
    precision, recall = precision_and_recall(
        seen.features, reference.features, neighbours=NEIGHBOURS
    )
    found = {
        "frechet_distance": frechet_distance(seen.features, reference.features),
        "precision": precision,
        "recall": recall,
    }
    if seen.logits is not None and condition.labels is not None:
        right = seen.logits.argmax(1) == condition.labels
        found["class_consistency"] = float(right.double().mean())
    return found
