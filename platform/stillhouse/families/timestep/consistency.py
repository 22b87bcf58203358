"""What the continuous-time consistency methods have in common, when states are given.

A method says where the student is trained, which are states on the teacher's paths with the
teacher's velocity there; `consistency` computes the loss of `objectives.consistency` at them.
"""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from stillhouse.diffusion.tangents import Tangent, consistency_direction
from stillhouse.errors import TrainingDiverged
from stillhouse.families.timestep.networks import Networks
from stillhouse.objectives.consistency import (
    TangentForm,
    Weighting,
    consistency_loss,
    finite_rows,
    normalised,
)
from stillhouse.ranges import CountFrom0, Positive, Share
from stillhouse.records.diffusion import Condition
from stillhouse.records.losses import LossTerms


@dataclass(frozen=True)
class States:
    """Places on the teacher's paths.

    Attributes:
        x_t: [B, ...].
        t: [B]; float64.
        velocity: F_T there [B, ...], guided as the student is to be.
        condition: of each.
        guidance_scale: of each [B].
        kept: [B]; 0 for a state that the loss leaves out, else 1; None for all.
    """

    x_t: Float[Tensor, "B ..."]
    t: Float[Tensor, "B"]
    velocity: Float[Tensor, "B ..."]
    condition: Condition
    guidance_scale: Float[Tensor, "B"]
    kept: Float[Tensor, "B"] | None = None


ConsistencyLoss = Callable[[Networks, States, float], LossTerms]


def consistency(
    networks: Networks,
    states: States,
    r: float,
    *,
    tangent: Tangent,
    form: TangentForm,
    weighting: Weighting,
    c: Positive = 0.2,
    max_nan_share: Share = 0.1,
) -> LossTerms:
    """Return the loss at some states, a mean over those that count.

    Args:
        networks: of the family.
        states: where.
        r: how much of the tangent counts.
        tangent: of `diffusion.tangents`.
        form: of `objectives.consistency`, what g is.
        weighting: of `objectives.consistency`, w(t).
        c: what is added to the norm of g; papers with σ_d = 0.5 say half of it.
        max_nan_share: states whose tangent is not finite are left out, up to this share of a batch.

    Raises:
        TrainingDiverged: for a greater share.
    """
    scale = states.guidance_scale

    def student(x_t: Tensor, t: Tensor) -> Tensor:
        return networks.student(x_t, t, states.condition, scale)

    x_t, t = states.x_t, states.t
    F, J = tangent(student, x_t, t, *consistency_direction(states.velocity, t))
    g = form(F.detach(), states.velocity, x_t, J, t, r)
    if not F.requires_grad:
        F = student(x_t, t)
    finite = finite_rows(g, F)
    lost = 1 - finite.double().mean()
    if lost > max_nan_share:
        raise TrainingDiverged(
            f"the tangents of {lost:.0%} of the states are not finite; expected at most "
            f"method.loss.max_nan_share={max_nan_share:.0%}; lower optimizer.learning_rate, or "
            "lengthen method.warmup_steps"
        )
    # Not a product with 0, which would keep a NaN.
    rows = finite.view(-1, *[1] * (F.ndim - 1))
    F, g = F.where(rows, 0), g.where(rows, 0)
    kept = finite.to(F.dtype) if states.kept is None else finite * states.kept
    u = None if networks.log_variance is None else networks.log_variance(t)
    losses = consistency_loss(F, normalised(g, c), weighting(t), u)
    total = (losses.where(kept > 0, 0) * kept).sum() / kept.sum().clamp_min(1)
    return LossTerms(
        total=total,
        terms={
            "tangent_norm": g.flatten(1).norm(dim=1).mean().detach(),
            "nan_share": lost.to(total.dtype),
        },
    )


def warmed(update: int, warmup_steps: CountFrom0) -> float:
    """Return r: it grows from 0 to 1 in so many updates."""
    return min(1.0, update / warmup_steps) if warmup_steps else 1.0
