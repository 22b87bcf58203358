"""Classifier-free guidance (2207.12598) of a velocity, and the scales that are drawn for it.

Two conventions are in use. Here, and in diffusers, w is `guidance_scale`:

    F_w = F(none) + w (F(condition) - F(none))       w = 1 is the conditional network, 0 the other

The paper's w' weighs the difference on top of the conditional network: w = 1 + w'.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from stillhouse.diffusion.paths import along
from stillhouse.errors import UserError
from stillhouse.ranges import Finite
from stillhouse.records.diffusion import Condition, TrigFlowNetwork

GuidanceScale = Callable[[int, torch.Generator], Float[Tensor, "B"]]


def fixed(count: int, generator: torch.Generator, *, scale: Finite = 1.0) -> Float[Tensor, "B"]:
    """Return the same scale for every sample."""
    return torch.full((count,), scale, dtype=torch.double)


def one_of(
    count: int, generator: torch.Generator, *, scales: Sequence[float]
) -> Float[Tensor, "B"]:
    """Return for each sample one of some scales, all equally likely (SANA-Sprint: 4, 4.5, 5)."""
    if not scales:
        raise UserError("guidance_scale.scales=[]: expected at least one number")
    chosen = torch.randint(len(scales), (count,), generator=generator)
    return torch.tensor(list(scales), dtype=torch.double)[chosen]


def check_dropout(network: TrigFlowNetwork, share: float) -> None:
    """Refuse to drop the conditions of a network that knows no samples without.

    Raises:
        UserError: naming the share.
    """
    if share > 0 and not getattr(network, "unconditional", True):
        raise UserError(
            f"method.condition_dropout={share}: the network knows no samples without a condition; "
            "expected 0, or one that was trained with student.unconditional=true"
        )


def guided(
    network: TrigFlowNetwork,
    x_t: Float[Tensor, "B ..."],
    t: Float[Tensor, "B"],
    condition: Condition,
    scale: Float[Tensor, "B"],
) -> Float[Tensor, "B ..."]:
    """Return F_w, by one call with both halves in a batch; by half of it where every w is 1.

    Args:
        network: teacher or fake score; it has to know unconditional samples (`Condition.none`).
        x_t, t: noisy samples and their times.
        condition: of each.
        scale: w of each.

    Raises:
        UserError: for a scale other than 1 and a network without unconditional samples.
    """
    if bool((scale == 1).all()):
        return network(x_t, t, condition)
    if not getattr(network, "unconditional", True):
        raise UserError(
            f"guidance_scale={float(scale.max()):g}: the network knows no samples without a "
            "condition, so it cannot be guided; expected 1, or teacher and fake score that were "
            "trained with method.condition_dropout above 0 and student.unconditional=true"
        )
    both = condition.none().joined(condition)
    none, said = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return none + along(scale, x_t) * (said - none)
