"""Whose turn it is: the schedule against a list that is written out cycle by cycle."""

import random

import pytest

from stillhouse.families.optimizers import adamw
from stillhouse.families.timestep.turns import Turn, Turns

CYCLES = 30


def turns_of(**others: tuple[int, int]) -> Turns:
    """Return turns from (updates, from_update) by name."""
    return Turns(
        {
            name: Turn(trains=[name], updates=updates, from_update=begins, optimizer=adamw)
            for name, (updates, begins) in others.items()
        }
    )


def written_out(**others: tuple[int, int]) -> list[tuple[str, int]]:
    """Return the phase and the cycle of every step."""
    steps = []
    for cycle in range(CYCLES):
        steps.append(("student", cycle))
        for name, (updates, begins) in others.items():
            steps += [(name, cycle)] * (updates if cycle >= begins else 0)
    return steps


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"critic": (1, 0)},
        {"critic": (5, 0)},
        {"critic": (4, 7)},
        {"critic": (2, 100)},
        {"fake_score": (3, 2), "discriminator": (1, 5), "third": (2, 0)},
    ],
    ids=str,
)
def test_phases_are_those_of_cycles_one_by_one(others: dict[str, tuple[int, int]]) -> None:
    turns, expected = turns_of(**others), written_out(**others)
    assert [turns.at(step) for step in range(len(expected))] == expected
    for name in ("student", *others):
        before = [sum(n == name for n, _ in expected[:step]) for step in range(len(expected))]
        assert [turns.updates(name, step) for step in range(len(expected))] == before
    firsts = [step for step, (name, _) in enumerate(expected) if name == "student"]
    assert [turns.steps(cycle) for cycle in range(CYCLES)] == firsts
    assert turns.steps(CYCLES) == len(expected)
    # After the last step of a budget every phase has had all of its own.
    assert turns.updates("student", turns.steps(CYCLES)) == CYCLES


def test_a_step_is_known_without_those_before_it() -> None:
    """Asked in any order and of another object, as after a resume; far ones at once."""
    others = {"critic": (5, 3), "late": (1, 9)}
    expected, turns = written_out(**others), turns_of(**others)
    order = random.Random(0).sample(range(len(expected)), len(expected))
    assert all(turns.at(step) == turns_of(**others).at(step) == expected[step] for step in order)
    far = turns.steps(10**9)
    assert turns.at(far) == ("student", 10**9)
    assert turns.at(far - 1) == ("late", 10**9 - 1)
    assert turns.at(far + 5) == ("critic", 10**9)
