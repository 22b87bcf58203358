"""Whether more of a metric is better, by the words of its name; which points are on the front."""

import re
from collections.abc import Sequence

LESS = "nll loss bpb perplexity distance wasserstein kl error latency memory bytes parameters calls"
LESS += " flops seconds entropy ms bits"
MORE = (
    "accuracy agreement acceptance efficiency f1 matthews pearson spearman score precision recall"
)
MORE += " consistency recovery speedup kept closed removed"


def sign_of(metric: str) -> int | None:
    """Return 1 where more is better, -1 where less is, None where the name does not tell."""
    if "_per_s" in metric:
        return 1
    words = re.split(r"[^a-z0-9]+", metric.lower())
    # `parameters_removed` and `kl_..._speedup` are what their last telling word says.
    for word in reversed(words):
        if word in MORE.split():
            return 1
        if word in LESS.split():
            return -1
    return None


def front(points: Sequence[tuple[float, float]], x_sign: int, y_sign: int) -> list[int]:
    """Return the indices of the points that none is better than in both, in the order of x.

    Args:
        points: (x, y), finite.
        x_sign: 1 where more of x is better, -1 where less is.
        y_sign: the same of y.
    """
    # From the best x on, a point is on the front when it betters every y before it.
    order = sorted(
        range(len(points)), key=lambda i: (-x_sign * points[i][0], -y_sign * points[i][1])
    )
    kept: list[int] = []
    for i in order:
        if not kept or y_sign * points[i][1] > y_sign * points[kept[-1]][1]:
            kept.append(i)
    return sorted(kept, key=lambda i: points[i][0])
