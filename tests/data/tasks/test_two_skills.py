"""The card's small experiment: sums in two styles, words to reverse, sums to rewrite."""

import re
from itertools import combinations

import pytest

from stillhouse.data.tasks.two_skills import (
    addition,
    reversal,
    rewriting,
    tens_then_units,
    two_skills,
    units_then_carry,
)
from stillhouse.errors import UserError

SIZES = {"train_exercises": 300, "validation_exercises": 40, "test_exercises": 60, "seed": 0}
PROMPT = "{instruction} as {reference}"
STYLES = (units_then_carry, tens_then_units)


def sums(style=units_then_carry, **changes):
    return addition(style=style, **(SIZES | changes))


def words(**changes):
    return reversal(**({"shortest": 3, "longest": 6} | SIZES | changes))


def rewritings(**changes):
    styles = {"reference_style": tens_then_units, "style": units_then_carry}
    return rewriting(**({"prompt": PROMPT} | styles | SIZES | changes))


@pytest.mark.parametrize("style", STYLES)
def test_every_step_of_every_sum_is_true_and_the_last_number_is_the_sum(style):
    for a in range(10, 100):
        for b in range(10, 100):
            text = style(a, b)
            steps = re.findall(r"([0-9+]+)=([0-9]+)", text)
            assert len(steps) == (2 if style is units_then_carry else 3)
            assert all(sum(map(int, left.split("+"))) == int(right) for left, right in steps)
            assert re.findall("[0-9]+", text)[-1] == str(a + b)
            assert text.isascii()


def test_the_styles_are_as_documented_and_differ_everywhere():
    assert units_then_carry(47, 38) == "7+8=15, 4+3+1=8, so 85"
    assert units_then_carry(97, 11) == "7+1=8, 9+1=10, so 108"
    assert tens_then_units(47, 38) == "40+30=70; 7+8=15; 70+15=85"
    assert all(units_then_carry(a, 55) != tens_then_units(a, 55) for a in range(10, 100))


def test_a_sum_is_right_in_any_style_and_wrong_otherwise():
    for exercise in sums().splits["train"]:
        a, b = map(int, re.findall("[0-9]+", exercise.instruction))
        assert exercise.check(exercise.answer)
        assert exercise.check(tens_then_units(a, b))
        assert exercise.check(f"{a + b}")
        wrong = (f"{a + b + 1}", f"{exercise.answer}0", f"{a + b} or {a}", "", "nonsense")
        assert not any(map(exercise.check, wrong))


def test_a_word_is_right_backwards_only():
    for exercise in words().splits["train"]:
        word = exercise.instruction.removeprefix("reverse: ")
        assert 3 <= len(word) <= 6
        assert exercise.answer == word[::-1] != word
        assert exercise.check(exercise.answer)
        assert not any(map(exercise.check, (word, f"{exercise.answer}.", exercise.answer[:-1], "")))


def test_a_sum_to_rewrite_shows_the_labels_style_and_is_answered_in_the_other():
    for exercise in rewritings().splits["train"]:
        a, b = map(int, exercise.place.removesuffix(", rewritten").split("+"))
        assert exercise.instruction == f"{a}+{b}=? as {tens_then_units(a, b)}"
        assert exercise.answer == units_then_carry(a, b)
        assert exercise.check(exercise.answer)
        assert not exercise.check(exercise.instruction + " 1")


def content(exercise):
    """Return what an exercise is about, whatever the order of its numbers or letters."""
    if exercise.task == "reversal":
        word = exercise.instruction.removeprefix("reverse: ")
        return min(word, word[::-1])
    return tuple(sorted(re.findall("[0-9]+", exercise.place)))


def test_no_content_is_in_two_splits_whatever_sizes_seeds_and_styles():
    sets = [
        [sums(), sums(tens_then_units, seed=1, train_exercises=4000), rewritings(seed=2)],
        [words(), words(seed=3, train_exercises=2000, longest=4)],
    ]
    for group in sets:
        parts = {
            split: {content(e) for made in group for e in made.splits[split]}
            for split in ("train", "validation", "test")
        }
        assert all(len(part) > 50 for part in parts.values())
        assert not any(parts[a] & parts[b] for a, b in combinations(parts, 2))


def test_sizes_are_kept_nothing_repeats_and_the_seed_decides():
    for make in (sums, words, rewritings):
        first, again, other = make(), make(), make(seed=1)
        for split, size in zip(("train", "validation", "test"), (300, 40, 60), strict=True):
            asked = [e.instruction for e in first.splits[split]]
            assert len(set(asked)) == len(asked) == size
        assert first.identity("train") == again.identity("train") != other.identity("train")


def test_skills_are_put_together_or_left_out():
    both = two_skills(addition=sums(), reversal=words(), rewriting=None)
    assert both.name == "addition, reversal"
    assert {e.task for e in both.splits["test"]} == {"addition", "reversal"}
    assert len(both.splits["train"]) == 600
    alone = two_skills(addition=sums(), reversal=None, rewriting=None)
    assert alone.identity("train") == sums().identity("train")
    assert {e.task for e in rewritings().splits["train"]} == {"rewriting"}


@pytest.mark.parametrize(
    ("make", "changes", "line"),
    [
        (
            sums,
            {"train_exercises": 9000},
            "data.corpus.exercises.addition.train_exercises=9000: only 6483 different sums were "
            "found for train; expected at most as many",
        ),
        (
            sums,
            {"validation_exercises": 0},
            "data.corpus.exercises.addition.validation_exercises=0: expected 1 or more",
        ),
        (
            words,
            {"longest": 2, "shortest": 2, "test_exercises": 90},
            "data.corpus.exercises.reversal.test_exercises=90: only 60 different words were found "
            "for test; expected at most as many",
        ),
        (
            words,
            {"longest": 2},
            "data.corpus.exercises.reversal.shortest=3, longest=2: expected 2 letters or more, and "
            "the longest word not to be shorter than the shortest",
        ),
        (
            rewritings,
            {"prompt": "{instruction}"},
            "data.corpus.exercises.rewriting.prompt='{instruction}': the template has no "
            "{reference}; expected {instruction} and {reference}, where an exercise's texts go",
        ),
        (
            lambda: two_skills(addition=None, reversal=None, rewriting=None),
            {},
            "data.corpus.exercises: addition, reversal and rewriting are null; expected one or "
            "more",
        ),
    ],
)
def test_sizes_and_values_that_cannot_be_had(make, changes, line):
    with pytest.raises(UserError) as caught:
        make(**changes)
    assert str(caught.value) == line
