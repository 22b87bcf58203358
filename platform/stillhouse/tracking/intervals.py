"""Means, spreads and Student's t intervals of a few repeats."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """What a few repeats say of a quantity.

    Attributes:
        mean: over the repeats.
        sd: sample standard deviation (ddof 1); None for one repeat.
        n: number of repeats.
        low: lower end of the 95 % t interval of the mean; None for one repeat.
        high: upper end of it.
    """

    mean: float
    sd: float | None
    n: int
    low: float | None
    high: float | None


def estimate(values: Sequence[float]) -> Estimate | None:
    """Summarise repeats; None where there are none. Of paired differences, it is the paired t."""
    n = len(values)
    if n == 0:
        return None
    if not all(math.isfinite(v) for v in values):
        unknown = math.nan if n > 1 else None
        return Estimate(sum(values) / n, unknown, n, unknown, unknown)
    # Exact where values are equal, which rounding would give a spread.
    mean = float(statistics.mean(values))
    if n == 1:
        return Estimate(mean, None, 1, None, None)
    sd = statistics.stdev(values)
    half = t_quantile(0.5 + CONFIDENCE / 2, n - 1) * sd / math.sqrt(n)
    return Estimate(mean, sd, n, mean - half, mean + half)


@lru_cache(maxsize=256)
def t_quantile(probability: float, df: int) -> float:
    """Return the quantile of Student's t distribution.

    Args:
        probability: in [0.5, 1).
        df: degrees of freedom, at least 1.
    """
    # Bisection over the angle, which is bounded where t is not.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        if _central(middle, df) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(df) * math.tan(low)


def _central(theta: float, df: int) -> float:
    """P(|T| < sqrt(df) tan(theta)): Abramowitz & Stegun 26.7.3 (df odd) and 26.7.4 (df even)."""
    odd = df % 2
    term = math.cos(theta) if odd else 1.0
    total = 0.0
    for k in range(1, df // 2 + 1):
        total += term
        term *= math.cos(theta) ** 2 * (2 * k - 1 + odd) / (2 * k + odd)
    area = math.sin(theta) * total
    return 2 / math.pi * (theta + area) if odd else area
