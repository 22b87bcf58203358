"""Two skills for small models: adding two numbers in written steps, and spelling backwards.

All is made from a seed, in short lines of ASCII. Steps are written by a `style`, a function of the
two numbers: one is the house style of the model that is to be pruned, another that of the labels
with which it is repaired.
"""

import random
import string
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.tasks.checking import says_exactly, says_integer
from stillhouse.data.tasks.exercises import Exercise, Exercises, fill_splits, sizes_of
from stillhouse.data.tasks.rewriting import asked_to_rewrite, check_prompt
from stillhouse.errors import UserError
from stillhouse.ranges import Count

Style = Callable[[int, int], str]

KEY = "data.corpus.exercises"
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LICENCE = "public domain"
WORDS_PER_EXERCISE = 40


def units_then_carry(a: int, b: int) -> str:
    """Add as on paper: `7+8=15, 4+3+1=8, so 85`."""
    carry, units = divmod(a % 10 + b % 10, 10)
    tens = [str(a // 10), str(b // 10), *(["1"] if carry else [])]
    steps = f"{a % 10}+{b % 10}={10 * carry + units}, {'+'.join(tens)}={a // 10 + b // 10 + carry}"
    return f"{steps}, so {a + b}"


def tens_then_units(a: int, b: int) -> str:
    """Add as in the head: `40+30=70; 7+8=15; 70+15=85`."""
    tens, units = 10 * (a // 10 + b // 10), a % 10 + b % 10
    return f"{a - a % 10}+{b - b % 10}={tens}; {a % 10}+{b % 10}={units}; {tens}+{units}={a + b}"


def two_skills(
    *, addition: Exercises | None, reversal: Exercises | None, rewriting: Exercises | None
) -> Exercises:
    """Put exercises together.

    Args:
        addition: made by `addition`; null leaves the skill out.
        reversal: made by `reversal`; the same.
        rewriting: made by `rewriting`; the same. A model that has learnt them can rewrite.

    Raises:
        UserError: when nothing is left.
    """
    parts = [part for part in (addition, reversal, rewriting) if part is not None]
    if not parts:
        raise UserError(f"{KEY}: addition, reversal and rewriting are null; expected one or more")
    return Exercises(
        name=", ".join(part.name for part in parts),
        licence=LICENCE,
        splits={split: [e for part in parts for e in part.splits[split]] for split in SPLITS},
    )


def addition(
    *,
    style: Style,
    train_exercises: Count,
    validation_exercises: Count,
    test_exercises: Count,
    seed: int,
) -> Exercises:
    """Make sums of two numbers of two digits; 47+38 and 38+47 are in one split.

    Args:
        style: writes the steps.
        train_exercises, validation_exercises, test_exercises: how many.
        seed: of their order.

    Raises:
        UserError: for more exercises than there are.
    """
    sizes = sizes_of(train_exercises, validation_exercises, test_exercises)
    splits = fill_splits(_sums(style, seed), sizes, key=f"{KEY}.addition", what="sums")
    return Exercises("addition", LICENCE, splits)


def reversal(
    *,
    shortest: int,
    longest: int,
    train_exercises: Count,
    validation_exercises: Count,
    test_exercises: Count,
    seed: int,
) -> Exercises:
    """Make words of random letters to spell backwards; a word and its reverse are in one split.

    Args:
        shortest, longest: letters of a word.
        train_exercises, validation_exercises, test_exercises: how many.
        seed: of the words.

    Raises:
        UserError: for lengths that no word has, or more exercises than there are.
    """
    key = f"{KEY}.reversal"
    if not 2 <= shortest <= longest:
        raise UserError(
            f"{key}.shortest={shortest}, longest={longest}: expected 2 letters or more, and the "
            "longest word not to be shorter than the shortest"
        )
    sizes = sizes_of(train_exercises, validation_exercises, test_exercises)
    # The rarer splits get one word in ten.
    tries = WORDS_PER_EXERCISE * max(sizes.values())
    words = islice(_words(shortest, longest, seed), max(0, tries))
    return Exercises("reversal", LICENCE, fill_splits(words, sizes, key=key, what="words"))


def rewriting(
    *,
    prompt: str,
    reference_style: Style,
    style: Style,
    train_exercises: Count,
    validation_exercises: Count,
    test_exercises: Count,
    seed: int,
) -> Exercises:
    """Make exercises of rewriting a sum: it is shown in one style and answered in another.

    A sum is in the same split as in `addition`.

    Args:
        prompt: the template of the stage `rewrite`.
        reference_style: writes the reference in the prompt.
        style: writes the answer.
        train_exercises, validation_exercises, test_exercises: how many.
        seed: of their order.

    Raises:
        UserError: for a template without a field, or more exercises than there are.
    """
    key = f"{KEY}.rewriting"
    check_prompt(prompt, key=f"{key}.prompt")
    sizes = sizes_of(train_exercises, validation_exercises, test_exercises)
    shown = (asked_to_rewrite(e, prompt) for _, e in _sums(reference_style, seed))
    answered = _sums(style, seed)
    candidates = (
        (
            content,
            Exercise("rewriting", s.instruction, a.answer, f"{s.place}, rewritten", check=a.check),
        )
        for s, (content, a) in zip(shown, answered, strict=True)
    )
    return Exercises("rewriting", LICENCE, fill_splits(candidates, sizes, key=key, what="sums"))


def _sums(style: Style, seed: int) -> Iterator[tuple[str, Exercise]]:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    random.Random(seed).shuffle(pairs)
    for a, b in pairs:
        question = f"{a}+{b}"
        right = partial(says_integer, expected=a + b)
        exercise = Exercise("addition", f"{question}=?", style(a, b), question, check=right)
        yield f"{min(a, b)}+{max(a, b)}", exercise


def _words(shortest: int, longest: int, seed: int) -> Iterator[tuple[str, Exercise]]:
    draws = random.Random(seed)
    while True:
        letters = draws.choices(string.ascii_lowercase, k=draws.randint(shortest, longest))
        word, answer = "".join(letters), "".join(reversed(letters))
        # A model that only copies would be right.
        if word == answer:
            continue
        right = partial(says_exactly, expected=answer)
        exercise = Exercise("reversal", f"reverse: {word}", answer, f"reverse: {word}", check=right)
        yield min(word, answer), exercise
