"""One tensor of two models: the ways of merging that `conf/merging/*.yaml` names.

Siblings with one signature: from the tensors a and b, of one shape and type, to the merged one.
`linear` and `slerp` move from a to b and take b's share t: t = 0 gives a, t = 1 gives b, and two
equal tensors stay what they are. `weighted_sum` has two free weights: where these do not add up to
1, it also scales, so two equal tensors do not stay what they are.

Spherical interpolation: Ken Shoemake, "Animating Rotation with Quaternion Curves", SIGGRAPH 1985;
for two repaired models: Thangarasa et al., "Self-Data Distillation for Recovering Quality in Pruned
Large Language Models", arXiv:2410.09982. With θ the angle between a and b, flattened,

    slerp(a, b; t) = sin((1-t) θ) / sin θ · a + sin(t θ) / sin θ · b

Sums are taken in float64, some entries at a time, so that a large tensor needs little memory beside
itself; the result has the tensors' type.
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.ranges import Finite, Share

# Above it the arc is straight to the eye, and sin θ a small divisor.
NEARLY_PARALLEL = 0.9995
ENTRIES_AT_A_TIME = 1 << 17


def slerp(a: Float[Tensor, "..."], b: Float[Tensor, "..."], *, weight: Share) -> Tensor:
    """Go along the arc from a to b; on the line where |cos θ| > 0.9995, or a or b is zero.

    Args:
        a, b: the tensors.
        weight: t, the share of b, in [0, 1].

    Raises:
        UserError: for a weight outside [0, 1].
    """
    _check_share(weight)
    cos = cosine(a, b)
    if cos is None or abs(cos) > NEARLY_PARALLEL:
        return _sum(a, 1 - weight, b, weight)
    theta = math.acos(cos)
    return _sum(
        a,
        math.sin((1 - weight) * theta) / math.sin(theta),
        b,
        math.sin(weight * theta) / math.sin(theta),
    )


def linear(a: Float[Tensor, "..."], b: Float[Tensor, "..."], *, weight: Share) -> Tensor:
    """Go along the line from a to b: (1-t) a + t b.

    Args:
        a, b: the tensors.
        weight: t, the share of b, in [0, 1].

    Raises:
        UserError: for a weight outside [0, 1].
    """
    _check_share(weight)
    return _sum(a, 1 - weight, b, weight)


def weighted_sum(
    a: Float[Tensor, "..."], b: Float[Tensor, "..."], *, first_weight: Finite, second_weight: Finite
) -> Tensor:
    """Add the tensors, each with a weight of its own, whatever the two add up to.

    Args:
        a, b: the tensors.
        first_weight: of a, any finite number.
        second_weight: of b, any finite number.

    Raises:
        UserError: for a weight that is not finite.
    """
    for key, weight in (("first_weight", first_weight), ("second_weight", second_weight)):
        if not math.isfinite(weight):
            raise UserError(f"merging.{key}={weight}: expected a finite number")
    return _sum(a, first_weight, b, second_weight)


def cosine(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> float | None:
    """Return the cosine of the angle between two tensors, flattened; None where one is zero."""
    products = torch.zeros(3, dtype=torch.float64)
    for x, y in _chunks(a, b):
        x, y = x.double(), y.double()
        products += torch.stack([x @ y, x @ x, y @ y])
    dot, of_a, of_b = products.tolist()
    if of_a == 0 or of_b == 0:
        return None
    return max(-1.0, min(1.0, dot / math.sqrt(of_a) / math.sqrt(of_b)))


def is_finite(tensor: Float[Tensor, "..."]) -> bool:
    """Whether a tensor holds neither NaN nor infinity."""
    return all(bool(part.isfinite().all()) for part in tensor.reshape(-1).split(ENTRIES_AT_A_TIME))


def _sum(a: Tensor, weight_of_a: float, b: Tensor, weight_of_b: float) -> Tensor:
    """Return w_a a + w_b b."""
    merged = torch.empty_like(a, memory_format=torch.contiguous_format)
    parts = merged.view(-1).split(ENTRIES_AT_A_TIME)
    for part, (x, y) in zip(parts, _chunks(a, b), strict=True):
        part.copy_((x.double() * weight_of_a).add_(y.double(), alpha=weight_of_b))
    return merged


def _chunks(a: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(
        a.reshape(-1).split(ENTRIES_AT_A_TIME), b.reshape(-1).split(ENTRIES_AT_A_TIME), strict=True
    )


def _check_share(weight: Share) -> None:
    if not 0 <= weight <= 1:
        raise UserError(
            f"merging.weight={weight}: expected the share of the second model, from 0 to 1"
        )
