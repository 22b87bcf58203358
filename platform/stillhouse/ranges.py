"""What a setting may be, as types: their ranges are checked before the first stage runs."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Range:
    """Stands in an annotation beside the type that it narrows.

    Attributes:
        holds: whether a value of the type is allowed.
        words: what is allowed, as a message says it.
    """

    holds: Callable[[Any], bool]
    words: str


Count = Annotated[int, Range(lambda value: value >= 1, "1 or more")]
CountFrom0 = Annotated[int, Range(lambda value: value >= 0, "0 or more")]
CountFrom2 = Annotated[int, Range(lambda value: value >= 2, "2 or more")]
Weight = Annotated[float, Range(lambda value: 0 <= value < math.inf, "0 or more")]
Positive = Annotated[float, Range(lambda value: 0 < value < math.inf, "a number above 0")]
Share = Annotated[float, Range(lambda value: 0 <= value <= 1, "a number from 0 to 1")]
Finite = Annotated[float, Range(math.isfinite, "a finite number")]
