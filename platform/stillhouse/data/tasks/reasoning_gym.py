"""Exercises of the package `reasoning-gym`, made without end by named generators."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from stillhouse.data.stream import generator_for
from stillhouse.data.tasks.checking import NUMBER, said_answer, said_integer
from stillhouse.data.tasks.exercises import HELD_OUT, Exercise, Exercises, fill_splits, sizes_of
from stillhouse.data.vocabulary import one_line
from stillhouse.errors import UserError, did_you_mean
from stillhouse.ranges import Count

KEY = "data.corpus.exercises"
# Questions repeat, and a held-out split gets one in ten.
SPARE = 4


def reasoning_gym(
    *,
    generators: Mapping[str, Mapping[str, Any] | None],
    train_exercises: Count,
    validation_exercises: Count,
    test_exercises: Count,
    seed: int,
) -> Exercises:
    """Make exercises; the label is the generator's worked answer where it has one.

    An answer is read as `data.tasks.checking` says and is right when the generator's own
    `score_answer` gives it the full score.

    Args:
        generators: name -> settings of a generator, those of its `…Config` save size and seed;
            null leaves it out.
        train_exercises, validation_exercises, test_exercises: how many of each generator.
        seed: of the exercises.

    Raises:
        UserError: without the package, for a generator or a setting that it does not have, one
            that gives no answer, and one with too few different questions.
    """
    sizes = sizes_of(train_exercises, validation_exercises, test_exercises)
    wanted = {name: kept for name, kept in generators.items() if kept is not None}
    if not wanted:
        raise UserError(f"{KEY}.generators is empty; expected names, such as {{chain_sum: {{}}}}")
    rare = max(validation_exercises, test_exercises) / HELD_OUT
    tries = int(SPARE * max(train_exercises, rare))
    made = [
        fill_splits(
            _exercises(name, settings, seed, tries),
            sizes,
            key=KEY,
            what=f"exercises of {name}",
        )
        for name, settings in wanted.items()
    ]
    return Exercises(
        name=f"reasoning-gym: {', '.join(wanted)}",
        licence="Apache-2.0",
        splits={split: [e for splits in made for e in splits[split]] for split in sizes},
    )


def _exercises(
    name: str, settings: Mapping[str, Any], seed: int, tries: int
) -> Iterator[tuple[str, Exercise]]:
    # The package's exercise i of seed s is exercise 0 of seed s + i: seeds are spread out.
    start = generator_for(seed).initial_seed() % 2**31
    dataset = _dataset(name, settings, size=max(1, tries), seed=start)
    for i in range(tries):
        try:
            entry = dataset[i]
        except (TypeError, ValueError, IndexError, AssertionError) as error:
            raise _refusal(name, settings, error) from error
        place = f"{name}, exercise {i}"
        question, answer = entry["question"].strip(), entry["answer"]
        if not isinstance(answer, str):
            raise UserError(
                f"{KEY}.generators.{name}: the generator gives no answer to learn; expected one "
                "that does; leave it out"
            )
        worked = entry["metadata"].get("answer_cot") or answer
        right = partial(_is_right, dataset=dataset, entry=entry)
        yield question, Exercise(name, question, worked, place, check=right)


def _dataset(name: str, settings: Mapping[str, Any], *, size: int, seed: int) -> Any:
    try:
        import reasoning_gym as package
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise UserError(
            "data=reasoning_gym needs the package reasoning-gym, which is not installed; install "
            "it with: pip install -e '.[tasks]'"
        ) from error
    if name not in DATASETS:
        raise UserError(
            f"{KEY}.generators.{name}: reasoning-gym has no such generator; its page lists them"
            f"{did_you_mean(name, DATASETS)}"
        )
    try:
        return package.create_dataset(name, size=size, seed=seed, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise _refusal(name, settings, error) from error


def _refusal(name: str, settings: Mapping[str, Any], error: Exception) -> UserError:
    return UserError(
        f"{KEY}.generators.{name}={dict(settings)}: the generator does not take these settings: "
        f"{one_line(error)}"
    )


def _is_right(text: str, *, dataset: Any, entry: dict[str, Any]) -> bool:
    """Whether a text answers an exercise with full score."""
    answer, said = entry["answer"], said_answer(text)
    # 22.0 is an integer too; the scorer gets it as the generator writes it.
    if NUMBER.fullmatch(answer) and (number := said_integer(answer)) is not None:
        found = said_integer(text)
        said = answer if found == number else "" if found is None else str(found)
    try:
        return dataset.score_answer(said, entry) >= 1.0
    except Exception:  # a scorer raises whatever nonsense makes its parser raise
        return False
