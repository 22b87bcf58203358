"""Errors that a user can mend: what is wrong, where, and the command or key that mends it."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake or an obstacle outside the code: printed as one line, exit code 2."""


class TrainingDiverged(UserError):  # noqa: N818 - as in StopIteration: an outcome
    """The loss or a parameter stopped being a finite number."""


def did_you_mean(name: str, candidates: Iterable[str]) -> str:
    """Return `"; did you mean 'x' or 'y'?"` for the candidates nearest to `name`, else `""`."""
    near = difflib.get_close_matches(name, list(candidates), n=3, cutoff=0.6)
    return f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
