"""YAML values against the annotations of what they are given to."""

from collections.abc import Sequence
from typing import Any, Literal

import pytest

from stillhouse.config.signatures import fits


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, int, True),
        (True, int, False),
        ("1", int, False),
        (1, float, True),
        (1.5, int, False),
        ("x", str, True),
        (None, int | None, True),
        (None, int, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        ([1], Sequence[float], True),
        (1, list[int], False),
        ("x", dict[str, int], False),
        ({"_target_": "x"}, int, True),
        (object(), Any, True),
    ],
)
def test_plain_types_are_judged(value, hint, expected: bool) -> None:
    assert fits(value, hint) is expected
