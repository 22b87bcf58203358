"""What a task is: exercises with a worked answer and, where there is one, a verifier."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from stillhouse.data.corpora.corpus import Split
from stillhouse.data.documents import Conversation, Message
from stillhouse.errors import UserError
from stillhouse.files import hash_json

HELD_OUT = 0.1
HELD_OUT_SPLITS: tuple[Split, ...] = ("validation", "test")


@dataclass(frozen=True)
class Exercise:
    """A question, the answer to learn, and how another answer is checked.

    Attributes:
        task: name of the skill, by which accuracies are told apart.
        instruction: what the user asks.
        answer: the label, worked out as a model is to write it.
        place: where it was read or made, for messages of errors.
        context: what the system says before; None says nothing.
        check: whether a text answers rightly; None where nothing can be checked.
    """

    task: str
    instruction: str
    answer: str
    place: str
    context: str | None = None
    check: Callable[[str], bool] | None = None

    def question(self) -> list[Message]:
        """Return the messages by which a model is asked."""
        system = [] if self.context is None else [{"role": "system", "content": self.context}]
        return [*system, {"role": "user", "content": self.instruction}]

    def answered(self, answer: str, place: str | None = None) -> Conversation:
        """Return the question with an answer, from `place` if it is not the exercise's own."""
        turn = {"role": "assistant", "content": answer}
        return Conversation([*self.question(), turn], place or self.place)


@dataclass(frozen=True)
class Exercises:
    """Exercises by split.

    Attributes:
        name: of the set, for tables and model cards.
        licence: of its texts.
        splits: exercises of `train`, `validation` and `test`.
    """

    name: str
    licence: str
    splits: Mapping[Split, Sequence[Exercise]]

    def identity(self, split: Split) -> str:
        """Return the hash of what is asked and answered in a split."""
        return hash_json([[e.task, e.context, e.instruction, e.answer] for e in self.splits[split]])


def split_of(content: str) -> Split:
    """Return the split of a content: a tenth each is held out for validation and for test.

    The content's hash decides. So what one stage is tested on no other has trained on, whatever
    sizes, seeds and ways of writing they ask for.
    """
    place = int.from_bytes(hashlib.sha256(content.encode()).digest()[:6], "big") / 2**48
    if place < HELD_OUT:
        return "test"
    return "validation" if place < 2 * HELD_OUT else "train"


def sizes_of(train: int, validation: int, test: int) -> dict[Split, int]:
    """Return how many exercises each split gets."""
    return {"train": train, "validation": validation, "test": test}


def fill_splits(
    candidates: Iterable[tuple[str, Exercise]], sizes: Mapping[Split, int], *, key: str, what: str
) -> dict[Split, Sequence[Exercise]]:
    """Take the first exercises of every split; one that was asked before is passed over.

    Args:
        candidates: exercises, each with the content that decides its split.
        sizes: how many each split gets.
        key: of the sizes in the config.
        what: the exercises are, in the plural, for messages.

    Raises:
        UserError: for a size below 1, or more exercises than there are different ones.
    """
    for split, size in sizes.items():
        if size < 1:
            raise UserError(f"{key}.{split}_exercises={size}: expected 1 or more")
    found: dict[Split, list[Exercise]] = {split: [] for split in sizes}
    asked: set[tuple[str | None, str]] = set()
    missing = sum(sizes.values())
    for content, exercise in candidates:
        split, question = split_of(content), (exercise.context, exercise.instruction)
        if len(found[split]) == sizes[split] or question in asked:
            continue
        asked.add(question)
        found[split].append(exercise)
        missing -= 1
        if not missing:
            break
    for split, size in sizes.items():
        if len(found[split]) < size:
            raise UserError(
                f"{key}.{split}_exercises={size}: only {len(found[split])} different {what} were "
                f"found for {split}; expected at most as many"
            )
    return {**found}


def with_held_out_exercises(
    train: Sequence[Exercise],
    given: Mapping[Split, Sequence[Exercise]],
    *,
    source: str,
    naming: str,
) -> dict[Split, Sequence[Exercise]]:
    """Return all three splits, those that are not given held out of the training exercises.

    What a given split asks is left out of the others: nothing is trained on that is tested.

    Args:
        train: the training exercises.
        given: the validation and test exercises that the set has by itself.
        source: of the training exercises, key and value.
        naming: how a user names a split's own exercises, `{split}` standing for the split.

    Raises:
        UserError: for a split that is left empty.
    """
    missing: list[Split] = ["train", *(s for s in HELD_OUT_SPLITS if s not in given)]
    parts: dict[Split, list[Exercise]] = {split: [] for split in missing}
    asked = {(e.context, e.instruction) for exercises in given.values() for e in exercises}
    for exercise in train:
        if (exercise.context, exercise.instruction) in asked:
            continue
        split = split_of(f"{exercise.context or ''}\n{exercise.instruction}")
        parts[split if split in parts else "train"].append(exercise)
    for split, exercises in parts.items():
        if not exercises:
            own = naming.format(split="validation" if split == "train" else split)
            raise UserError(
                f"{source}: none of its exercises falls to {split}; give more, or name {own}"
            )
    return {**parts, **given}
