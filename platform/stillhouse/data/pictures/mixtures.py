"""Points of mixtures of Gaussians, about which everything is known."""

import math
from collections.abc import Mapping, Sequence

import torch

from stillhouse.data.pictures.pictures import Pictures, Samples, Split
from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.ranges import Count, Positive


def gaussian(*, mean: Sequence[float] = (0.6,), deviation: Positive = 0.4) -> GaussianMixture:
    """Return one Gaussian, whose consistency function is known.

    Args:
        mean: a number a coordinate.
        deviation: of every coordinate.
    """
    return GaussianMixture([list(mean)], [deviation])


def ring(
    *, components: Count = 8, classes: Count = 4, radius: Positive = 1.4, deviation: Positive = 0.1
) -> GaussianMixture:
    """Return Gaussians on a circle; those of a class lie apart from each other.

    Args:
        components: how many.
        classes: component i belongs to class i mod classes.
        radius: of the circle; √2 gives coordinates of about unit variance.
        deviation: of each component.
    """
    angles = [2 * math.pi * i / components for i in range(components)]
    means = [[radius * math.cos(a), radius * math.sin(a)] for a in angles]
    labels = [i % classes for i in range(components)]
    return GaussianMixture(means, [deviation] * components, labels=labels)


def drawn(
    *, mixture: GaussianMixture, train_points: Count = 20_000, held_out_points: Count = 4_000
) -> Pictures:
    """Return samples of a mixture as a data set.

    Args:
        mixture: what is drawn from.
        train_points, held_out_points: how many, for training, and for validation and test each.
    """
    counts: Mapping[Split, int] = {
        "train": train_points,
        "validation": held_out_points,
        "test": held_out_points,
    }
    splits: dict[Split, Samples] = {
        split: _samples(mixture, count, seed) for seed, (split, count) in enumerate(counts.items())
    }
    classes = tuple(str(label) for label in range(mixture.num_classes))
    return Pictures("a mixture of Gaussians", "none needed", classes, splits)


def _samples(mixture: GaussianMixture, count: int, seed: int) -> Samples:
    values, components = mixture.sample(count, torch.Generator().manual_seed(seed))
    return Samples(values, mixture.labels[components])
