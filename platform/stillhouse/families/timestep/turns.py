"""Networks that take turns: which of them a step of the optimiser is for.

A cycle is one update of the student, then those of every other phase that has begun by then, in
their order. Phases of an optimiser step are a pure function of its number: a run that goes on in
the middle of a cycle goes on with the very phase.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillhouse.families.distiller import OptimizerBuilder
from stillhouse.ranges import Count, CountFrom0

STUDENT = "student"


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A phase that is not the student's.

    Attributes:
        trains: networks that learn in it, `fake_score` and `discriminator`.
        updates: of theirs for one of the student, the two-time-scale rule.
        from_update: how many updates the student has before the first.
        optimizer: called with (what learns, how often it will).
    """

    trains: Sequence[str]
    updates: Count
    from_update: CountFrom0
    optimizer: OptimizerBuilder


@dataclass(frozen=True)
class Turns:
    """The order of phases.

    Attributes:
        others: phases besides the student's, by name; none for a student that learns alone.
    """

    others: Mapping[str, Turn]

    def steps(self, updates: int) -> int:
        """Return how many optimiser steps so many cycles take."""
        return updates + sum(
            turn.updates * max(0, updates - turn.from_update) for turn in self.others.values()
        )

    def at(self, step: int) -> tuple[str, int]:
        """Return the phase of an optimiser step, and the student's updates before its cycle."""
        cycle = bisect_right(range(step + 1), step, key=self.steps) - 1
        within = step - self.steps(cycle)
        if within == 0:
            return STUDENT, cycle
        within -= 1
        for name in self.others:
            length = self._length(name, cycle)
            if within < length:
                return name, cycle
            within -= length
        raise AssertionError("a cycle is as long as its phases")

    def updates(self, name: str, step: int) -> int:
        """Return how often a phase has been before an optimiser step."""
        cycle = self.at(step)[1]
        within = step - self.steps(cycle)
        if name == STUDENT:
            return cycle + (within > 0)
        turn, before = self.others[name], 1
        for other in self.others:
            if other == name:
                break
            before += self._length(other, cycle)
        inside = min(max(within - before, 0), self._length(name, cycle))
        return turn.updates * max(0, cycle - turn.from_update) + inside

    def _length(self, name: str, cycle: int) -> int:
        turn = self.others[name]
        return turn.updates if cycle >= turn.from_update else 0
