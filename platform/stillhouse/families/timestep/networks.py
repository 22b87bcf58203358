"""What a method of the family is called with besides the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Generator, Tensor

from stillhouse.records.diffusion import Condition, TrigFlowNetwork
from stillhouse.records.losses import LossTerms


@dataclass(frozen=True)
class Networks:
    """The networks that a method calls; it keeps none of them.

    Attributes:
        student: what learns.
        teacher: frozen; None where a method has none.
        log_variance: u(t), learnt beside the student and left behind; None where losses are not
            weighted by what is learnt.
        fake_score: follows the student's samples; None where a method has none.
        discriminator: called with (trunk, x_t, t, condition), returns logits [B, K], high for what
            is real; None where a method has none.
    """

    student: TrigFlowNetwork
    teacher: TrigFlowNetwork | None
    log_variance: Callable[[Float[Tensor, "B"]], Float[Tensor, "B"]] | None
    fake_score: TrigFlowNetwork | None = None
    discriminator: Callable[[Any, Tensor, Tensor, Condition], Tensor] | None = None


@dataclass(frozen=True)
class Phase:
    """Where training stands.

    Attributes:
        update: how many updates the student has had.
        updates: how many it will have.
        turn: how often the phase itself has been before; a critic's runs faster than `update`.
    """

    update: int
    updates: int
    turn: int = 0


TimestepMethod = Callable[[Networks, Any, Phase, Generator], LossTerms]
