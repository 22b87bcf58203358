"""What a method returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class LossTerms:
    """A loss and the terms that it is made of.

    Attributes:
        total: what is differentiated; reduction as the family's docstring says.
        terms: the parts by name, detached, for the log.
    """

    total: Float[Tensor, ""]
    terms: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict)
