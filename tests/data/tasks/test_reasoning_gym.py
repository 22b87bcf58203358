import sys
from itertools import combinations

import pytest

from stillhouse.data.tasks import reasoning_gym as module
from stillhouse.data.tasks.reasoning_gym import reasoning_gym
from stillhouse.errors import UserError

SIZES = {"train_exercises": 40, "validation_exercises": 5, "test_exercises": 8, "seed": 0}
GENERATORS = {
    "chain_sum": {"max_terms": 3, "max_digits": 2},
    "gsm_symbolic": {},
    "spell_backward": {},
    "number_sorting": {},
}


def made(generators=None, **changes):
    return reasoning_gym(generators=generators or GENERATORS, **(SIZES | changes))


@pytest.fixture(scope="module")
def exercises():
    return made()


def test_null_leaves_a_generator_out():
    some = made({"chain_sum": {"max_terms": 3}, "gsm_symbolic": None})
    assert {e.task for e in some.splits["train"]} == {"chain_sum"}
    assert some.name == "reasoning-gym: chain_sum"


def of(exercises, task):
    return [e for e in exercises.splits["train"] if e.task == task]


def test_every_generator_fills_every_split_with_different_questions(exercises):
    for split, size in zip(("train", "validation", "test"), (40, 5, 8), strict=True):
        for task in GENERATORS:
            asked = [e.instruction for e in exercises.splits[split] if e.task == task]
            assert len(set(asked)) == len(asked) == size


def test_no_question_is_in_two_splits_whatever_sizes_and_seeds(exercises):
    others = [exercises, made(seed=1, train_exercises=100), made(seed=2)]
    parts = [
        {e.instruction for one in others for e in one.splits[split]}
        for split in ("train", "validation", "test")
    ]
    assert not any(a & b for a, b in combinations(parts, 2))


def test_every_label_is_right_and_nonsense_is_wrong(exercises):
    for part in exercises.splits.values():
        for exercise in part:
            assert exercise.check(exercise.answer), exercise
            assert not exercise.check("nonsense")
            assert not exercise.check("")


def test_a_worked_answer_is_the_label_and_the_last_number_counts(exercises):
    for exercise in of(exercises, "gsm_symbolic"):
        steps, _, number = exercise.answer.rpartition("#### ")
        assert len(steps) > 40
        # Some are written 22.0.
        whole = int(float(number))
        assert exercise.check(f"I think of it so: it comes to {whole}.")
        assert exercise.check(f"1 and 2.\nAnswer: {whole}.0 apples")
        assert not exercise.check(f"{whole}, or {whole + 1}")
        assert not exercise.check(f"Answer: {whole}.5")


def test_a_word_is_the_whole_text_or_stands_behind_a_mark(exercises):
    for exercise in of(exercises, "spell_backward"):
        assert exercise.check(f" {exercise.answer}\n")
        assert exercise.check(f"Letter by letter.\n#### {exercise.answer}")
        assert not exercise.check(f"It is {exercise.answer}")
        assert not exercise.check(exercise.answer[1:])


class ToTheLetter:
    """A scorer as most generators have it."""

    def score_answer(self, answer, entry):
        return float(answer == entry["answer"])


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("22.0", "so 22", True),
        ("22.0", "so 22.0.", True),
        ("1,000", "1000", True),
        ("22", "22.5", False),
        ("22.5", "so 22.5", False),
        ("22.5", "#### 22.5", True),
    ],
)
def test_only_the_value_of_an_integer_counts_where_a_scorer_reads_letters(answer, text, right):
    entry = {"answer": answer}
    assert module._is_right(text, dataset=ToTheLetter(), entry=entry) is right


def test_a_scorer_that_fails_on_nonsense_has_not_found_it_right():
    class Fails:
        def score_answer(self, answer, entry):
            raise SyntaxError(answer)

    assert not module._is_right("(", dataset=Fails(), entry={"answer": "a"})


def test_settings_reach_the_generator(exercises):
    numbers = [
        int(w) for e in of(exercises, "chain_sum") for w in e.instruction.split() if w.isdecimal()
    ]
    assert max(numbers) < 100


def test_seeds_are_spread_out_and_reproduce():
    first, again, other = (made({"chain_sum": {}}, seed=s) for s in (0, 0, 1))
    assert first.identity("train") == again.identity("train")
    asked = [{e.instruction for e in m.splits["train"]} for m in (first, other)]
    # Taken as they are, neighbouring seeds would share all but one of their exercises.
    assert len(asked[0] & asked[1]) < 3


KEY = "data.corpus.exercises"


@pytest.mark.parametrize(
    ("generators", "changes", "line"),
    [
        (
            {"chain_sums": {}},
            {},
            f"{KEY}.generators.chain_sums: reasoning-gym has no such generator; its page lists "
            "them; did you mean 'chain_sum' or 'decimal_chain_sum'?",
        ),
        (
            {"chain_sum": {"terms": 3}},
            {},
            f"{KEY}.generators.chain_sum={{'terms': 3}}: the generator does not take these "
            "settings: TypeError: ChainSumConfig.__init__() got an unexpected keyword argument "
            "'terms'",
        ),
        (
            {"chain_sum": {"min_terms": 5, "max_terms": 4}},
            {},
            f"{KEY}.generators.chain_sum={{'min_terms': 5, 'max_terms': 4}}: the generator does "
            "not take these settings: AssertionError: max_terms must be >= min_terms",
        ),
        (
            {"spell_backward": {"min_word_len": 60, "max_word_len": 61}},
            {},
            f"{KEY}.generators.spell_backward={{'min_word_len': 60, 'max_word_len': 61}}: the "
            "generator does not take these settings: IndexError: Cannot choose from an empty "
            "sequence",
        ),
        (
            {"propositional_logic": {}},
            {},
            f"{KEY}.generators.propositional_logic: the generator gives no answer to learn; "
            "expected one that does; leave it out",
        ),
        (
            {"chain_sum": {"max_terms": 2, "max_digits": 1}},
            {"train_exercises": 500},
            f"{KEY}.train_exercises=500: only 157 different exercises of chain_sum were found for "
            "train; expected at most as many",
        ),
    ],
)
def test_what_the_package_cannot_give_is_refused(generators, changes, line):
    with pytest.raises(UserError) as caught:
        made(generators, **changes)
    assert str(caught.value) == line


def test_no_generators_are_refused():
    with pytest.raises(UserError) as caught:
        reasoning_gym(generators={"chain_sum": None}, **SIZES)
    assert str(caught.value) == (
        f"{KEY}.generators is empty; expected names, such as {{chain_sum: {{}}}}"
    )


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError) as caught:
        made()
    assert str(caught.value) == (
        "data=reasoning_gym needs the package reasoning-gym, which is not installed; install it "
        "with: pip install -e '.[tasks]'"
    )
