"""The evaluation of generators of points, whose data are a known mixture."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from stillhouse.data.images import ImageData
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.evaluation.distances import sliced_wasserstein
from stillhouse.evaluation.generators import FLOOR, drawn, flow_samplers, real_samples, samplers
from stillhouse.evaluation.language_models import Evaluated
from stillhouse.ranges import Count, Finite
from stillhouse.records.diffusion import Condition
from stillhouse.tracking.sample_pictures import draw_points

# A sample belongs to a mode within so many of its deviations, 99.97 % of a Gaussian's in 2-D do.
REACH = 4.0
# A mode is covered by this share of its samples, and is not to be found by chance.
COVERED = 0.1


def points(
    models: Mapping[str, str],
    data: ImageData,
    *,
    mixture: GaussianMixture,
    guidance_scale: Finite,
    teacher_steps: Sequence[int],
    seed: int,
    speed_repeats: Count,
) -> Evaluated:
    """Compare samples with the data of the same conditions.

    Args:
        models: role -> path of its pipeline.
        data: points of the mixture; the test split says how many samples of which classes.
        mixture: the truth, and the teacher, which is integrated in some numbers of steps.
        guidance_scale: of the teacher.
        teacher_steps: those numbers.
        seed: of the noise.
        speed_repeats: how often the latency of a single sample is taken.
    """
    teacher = mixture.requires_grad_(False)
    rows = flow_samplers("teacher", teacher, steps=teacher_steps, guidance_scale=guidance_scale)
    for role, path in models.items():
        rows |= samplers(role, path, steps=teacher_steps, guidance_scale=guidance_scale)
    truth = real_samples(data, "test")
    other = real_samples(data, "validation")
    numbers: dict[str, Mapping[str, float | int]] = {
        FLOOR: _quality(other.x_0, other.condition, truth.x_0, mixture)
    }
    clouds: dict[str, Tensor] = {FLOOR: other.x_0}
    for row, sampler in rows.items():
        found = drawn(sampler, data, seed=seed, repeats=speed_repeats)
        quality = _quality(found.samples, truth.condition, truth.x_0, mixture)
        numbers[row] = {**quality, **found.cost}
        clouds[row] = found.samples
    pictures = {"samples": partial(_draw, clouds)} if data.image_shape == (2,) else {}
    return Evaluated(models=numbers, pictures=pictures)


def _draw(clouds: Mapping[str, Tensor], path: Path) -> Path:
    return draw_points({row: cloud[:2000].tolist() for row, cloud in clouds.items()}, path)


def _quality(
    samples: Float[Tensor, "N D"],
    condition: Condition,
    truth: Float[Tensor, "M D"],
    mixture: GaussianMixture,
) -> dict[str, float]:
    """Return a row's numbers: distance, modes that are found, samples on none, right classes."""
    distances = (samples[:, None].double() - mixture.means).norm(dim=2) / mixture.deviations
    nearest = distances.min(1)
    on_mode = nearest.values < REACH
    counts = nearest.indices[on_mode].bincount(minlength=len(mixture.means))
    covered = counts >= COVERED * len(samples) * mixture.weights
    found = {
        "sliced_wasserstein": sliced_wasserstein(samples, truth),
        "covered_modes": float(covered.double().mean()),
        "off_mode_share": float((~on_mode).double().mean()),
    }
    if condition.labels is not None:
        right = mixture.labels[nearest.indices] == condition.labels[: len(samples)]
        found["class_consistency"] = float((right & on_mode).double().mean())
    return found
