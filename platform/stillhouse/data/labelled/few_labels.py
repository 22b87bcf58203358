"""Training on few labels: nested, balanced subsets of a training part."""

import hashlib
from collections.abc import Sequence
from itertools import zip_longest

from stillhouse.data.labelled.task import Example, Task, content_of
from stillhouse.errors import UserError


def few_labels(
    examples: Sequence[Example], task: Task, *, count: int | None, seed: int, key: str
) -> list[Example]:
    """Return the first `count` examples of an order whose every beginning is balanced.

    Classes take turns for as long as each has examples left. Within a class the hash of seed and
    content orders: so 50 examples are among 200, and the first of them stand in the same places.
    A regression and several labels have no classes to take turns.

    Args:
        examples: the training part.
        task: what its labels say.
        count: how many are kept; None keeps all.
        seed: of the order.
        key: of `count` in the config.

    Raises:
        UserError: for a count that leaves out a class, or that is more than there are.
    """
    fewest = task.num_labels if task.kind == "classification" else 1
    if count is not None and not fewest <= count <= len(examples):
        raise UserError(
            f"{key}={count}: expected {fewest} to {len(examples)}, an example of every class at "
            "least and the training part at most, or null for all of it"
        )
    classes: dict[object, list[Example]] = {}
    for example in sorted(examples, key=lambda e: _place(e, seed)):
        turn = example.label if task.kind == "classification" else None
        classes.setdefault(turn, []).append(example)
    turns = [classes[label] for label in sorted(classes, key=str)]
    return [e for turn in zip_longest(*turns) for e in turn if e is not None][:count]


def _place(example: Example, seed: int) -> bytes:
    content = f"{seed}\n{content_of(example)}\n{example.label}"
    return hashlib.sha256(content.encode()).digest()
