"""Means and t intervals, by hand and by scipy."""

import math

import pytest
from scipy import stats

from stillhouse.tracking.intervals import estimate, t_quantile


@pytest.mark.parametrize("df", [1, 2, 3, 4, 5, 9, 10, 63, 1000])
@pytest.mark.parametrize("probability", [0.5, 0.75, 0.975, 0.9995])
def test_t_quantile_is_scipys(df: int, probability: float) -> None:
    wanted = stats.t.ppf(probability, df)
    assert t_quantile(probability, df) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_estimate_by_hand_and_by_scipy() -> None:
    found = estimate([1.0, 2.0, 4.0, 5.0])
    assert found is not None
    assert (found.mean, found.n) == (3.0, 4)
    assert found.sd == pytest.approx(math.sqrt(10 / 3))  # squares sum to 4 + 1 + 1 + 4, over n - 1
    wanted = stats.t.interval(0.95, 3, loc=3.0, scale=math.sqrt(10 / 3) / 2)
    assert (found.low, found.high) == pytest.approx(wanted)


def test_estimate_of_none_of_one_and_of_equal_ones() -> None:
    assert estimate([]) is None
    one = estimate([0.1])
    assert one is not None
    assert (one.mean, one.sd, one.n, one.low, one.high) == (0.1, None, 1, None, None)
    equal = estimate([0.1, 0.1, 0.1])
    assert equal is not None
    assert (equal.sd, equal.low, equal.high) == (0.0, 0.1, 0.1)


def test_estimate_of_what_is_not_finite_is_nan() -> None:
    found = estimate([1.0, math.inf, -math.inf])
    assert found is not None
    assert found.sd is not None
    assert math.isnan(found.mean)
    assert math.isnan(found.sd)
