"""Distances between sets of samples, against closed forms and other libraries."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from stillhouse.evaluation.distances import (
    frechet_distance,
    precision_and_recall,
    sliced_wasserstein,
)


def cloud(count: int, dims: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed))


def test_the_distance_of_a_shifted_and_scaled_gaussian() -> None:
    """|μ|²/D on average over directions, and (1 - s)² for a scale: both are known in one line."""
    x = cloud(5000, 2)
    shift = torch.tensor([3.0, 4.0])
    assert sliced_wasserstein(x, x) == 0
    assert sliced_wasserstein(x + shift, x, directions=1000) == pytest.approx(
        5 / math.sqrt(2), rel=0.05
    )
    assert sliced_wasserstein(0.5 * x, x) == pytest.approx(0.5, rel=0.03)


def test_unequal_numbers_are_compared_by_quantiles() -> None:
    a, b = cloud(3000, 3, 1), cloud(8000, 3, 2)
    assert sliced_wasserstein(a, b) < 0.06
    assert sliced_wasserstein(a + 1, b) == pytest.approx(1.0, rel=0.1)
    assert sliced_wasserstein(a, b) == pytest.approx(sliced_wasserstein(b, a))


def test_the_frechet_distance_is_that_of_its_formula() -> None:
    a = cloud(500, 6) @ torch.randn(6, 6, generator=torch.Generator().manual_seed(3))
    b = cloud(400, 6, 1) + 0.7
    covs = [np.cov(x.double().numpy(), rowvar=False) for x in (a, b)]
    root = sqrtm(covs[0] @ covs[1]).real
    difference = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = float(difference) + np.trace(covs[0] + covs[1] - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)


def test_the_frechet_distance_where_a_feature_is_constant() -> None:
    a, b = cloud(100, 3), cloud(100, 3, 1)
    a[:, 1], b[:, 1] = 2.0, 5.0
    rest = frechet_distance(a[:, [0, 2]], b[:, [0, 2]])
    assert frechet_distance(a, b) == pytest.approx(9 + rest)


def test_precision_and_recall() -> None:
    """Two modes: samples of one have full precision and half the recall, and the reverse."""
    both = torch.cat([cloud(200, 2), cloud(200, 2, 1) + 50])
    one = cloud(200, 2, 2)
    precision, recall = precision_and_recall(one, both)
    assert precision > 0.8
    assert 0.35 < recall < 0.52
    assert precision_and_recall(both, one) == pytest.approx((recall, precision))
    assert precision_and_recall(one + 1000, both) == (0, 0)
    assert precision_and_recall(both, both) == (1, 1)
