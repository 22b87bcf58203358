"""Which layer of the teacher each layer of a student is compared with.

A layer map is called with (student_layers, teacher_layers), the numbers of blocks, and returns
student's layer -> teacher's layer. Layer i is what block i hands on; 0 is the embeddings.
"""

from collections.abc import Callable, Mapping, Sequence

from stillhouse.errors import UserError
from stillhouse.ranges import Count

KEY = "stages.<stage>.family.layer_map"
LayerMap = Callable[[int, int], Mapping[int, int]]


def uniform(
    student_layers: int, teacher_layers: int, *, embeddings: bool = False
) -> Mapping[int, int]:
    """Spread the student's layers evenly: g(l) = l L_t / L_s, rounded to the nearest, halves up.

    The last layers meet; 4 layers and 12 give 1 -> 3, 2 -> 6, 3 -> 9, 4 -> 12.

    Args:
        student_layers: L_s.
        teacher_layers: L_t.
        embeddings: whether 0 -> 0 is among them.

    Raises:
        UserError: for a student that is deeper than its teacher.
    """
    _check_depth(student_layers, teacher_layers)
    layers = range(0 if embeddings else 1, student_layers + 1)
    return {n: (2 * n * teacher_layers + student_layers) // (2 * student_layers) for n in layers}


def last(
    student_layers: int,
    teacher_layers: int,
    *,
    count: Count | None = None,
    embeddings: bool = False,
) -> Mapping[int, int]:
    """Match the last layers, one by one from the top: g(L_s - i) = L_t - i.

    Args:
        student_layers: L_s.
        teacher_layers: L_t.
        count: of matched layers; null takes all of the student's.
        embeddings: whether 0 -> 0 is among them.

    Raises:
        UserError: for a count below 1 or above L_s, or a student that is deeper than its teacher.
    """
    _check_depth(student_layers, teacher_layers)
    count = student_layers if count is None else count
    if not 1 <= count <= student_layers:
        raise UserError(
            f"{KEY}.count={count}: expected 1 to {student_layers}, the student's layers, or null"
        )
    matched = {student_layers - i: teacher_layers - i for i in reversed(range(count))}
    return {0: 0, **matched} if embeddings else matched


def given(
    student_layers: int, teacher_layers: int, *, layers: Sequence[Sequence[int]]
) -> Mapping[int, int]:
    """Match layers as a recipe lists them.

    Args:
        student_layers: L_s.
        teacher_layers: L_t.
        layers: pairs [student's layer, teacher's layer].

    Raises:
        UserError: for no pair, a layer that is not there or is the student's twice, or embeddings
            matched with a block.
    """
    said = [list(p) if isinstance(p, Sequence) and not isinstance(p, str) else p for p in layers]
    where = f"{KEY}.layers={said}"
    if not said or not all(map(_is_pair, said)):
        raise UserError(
            f"{where}: expected pairs of a layer of the student and one of the teacher, say "
            "[[1, 3], [2, 6]]"
        )
    pairs = sorted((ours, theirs) for ours, theirs in layers)
    for ours, theirs in pairs:
        for layer, depth, whose in (
            (ours, student_layers, "student"),
            (theirs, teacher_layers, "teacher"),
        ):
            if layer not in range(depth + 1):
                raise UserError(f"{where}: the {whose} has the layers 0 to {depth}, not {layer}")
        if (ours == 0) != (theirs == 0):
            raise UserError(f"{where}: expected 0, the embeddings, to go with 0 alone")
    if len(dict(pairs)) < len(pairs):
        raise UserError(f"{where}: expected each layer of the student once")
    return dict(pairs)


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and [type(layer) for layer in value] == [int, int]


def _check_depth(student_layers: int, teacher_layers: int) -> None:
    if student_layers > teacher_layers:
        raise UserError(
            f"{KEY}: the student has {student_layers} layers, the teacher {teacher_layers}; "
            "expected no more than the teacher's, or the map `given`, which may name one twice"
        )
