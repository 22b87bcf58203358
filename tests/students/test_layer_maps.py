"""Which layers meet, and maps that name one that is not there."""

from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from stillhouse.errors import UserError
from stillhouse.students.layer_maps import given, last, uniform

KEY = "stages.<stage>.family.layer_map"


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        (4, 12, {1: 3, 2: 6, 3: 9, 4: 12}),
        (6, 12, {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}),
        (4, 6, {1: 2, 2: 3, 3: 5, 4: 6}),
        (3, 3, {1: 1, 2: 2, 3: 3}),
        (1, 12, {1: 12}),
    ],
)
def test_uniform_spreads_the_student_s_layers(student, teacher, expected) -> None:
    assert uniform(student, teacher) == expected
    with_embeddings = uniform(student, teacher, embeddings=True)
    assert with_embeddings == {0: 0} | expected
    assert list(with_embeddings) == sorted(with_embeddings)


def test_uniform_never_names_a_layer_twice_and_ends_at_the_last() -> None:
    for teacher in range(1, 25):
        for student in range(1, teacher + 1):
            layers = list(uniform(student, teacher).values())
            assert layers == sorted(set(layers))
            assert layers[0] >= 1
            assert layers[-1] == teacher


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1: 10, 2: 11, 3: 12}),
        ({"count": 1}, {3: 12}),
        ({"count": 2, "embeddings": True}, {0: 0, 2: 11, 3: 12}),
    ],
)
def test_last_counts_from_the_top(options: dict[str, Any], expected) -> None:
    found = last(3, 12, **options)
    assert found == expected
    assert list(found) == sorted(found)


def test_given_layers_come_from_a_recipe_in_rising_order() -> None:
    node = OmegaConf.create(
        {
            "_target_": "stillhouse.students.layer_maps.given",
            "_partial_": True,
            "layers": [[4, 11], [0, 0], [2, 11]],
        }
    )
    found = instantiate({"map": node})["map"](4, 12)
    assert found == {0: 0, 2: 11, 4: 11}
    assert type(found) is dict
    assert list(found) == [0, 2, 4]


def refusal(layer_map: Any, *depths: int, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        layer_map(*depths, **options)
    return str(refused.value)


@pytest.mark.parametrize("layer_map", [uniform, last])
def test_a_student_that_is_deeper_than_its_teacher_is_refused(layer_map) -> None:
    assert refusal(layer_map, 6, 4) == (
        f"{KEY}: the student has 6 layers, the teacher 4; expected no more than the teacher's, or "
        "the map `given`, which may name one twice"
    )
    assert given(6, 4, layers=[[5, 4], [6, 4]]) == {5: 4, 6: 4}


@pytest.mark.parametrize("count", [0, 4, -1])
def test_a_count_that_the_student_has_not_is_refused(count: int) -> None:
    assert refusal(last, 3, 12, count=count) == (
        f"{KEY}.count={count}: expected 1 to 3, the student's layers, or null"
    )


PAIRS = "expected pairs of a layer of the student and one of the teacher, say [[1, 3], [2, 6]]"


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([[1, 13]], "the teacher has the layers 0 to 12, not 13"),
        ([[1, 3], [5, 12]], "the student has the layers 0 to 4, not 5"),
        ([[-1, 12]], "the student has the layers 0 to 4, not -1"),
        ([[0, 1]], "expected 0, the embeddings, to go with 0 alone"),
        ([[2, 0]], "expected 0, the embeddings, to go with 0 alone"),
        ([[2, 3], [2, 6]], "expected each layer of the student once"),
        ([], PAIRS),
        ([1, 2], PAIRS),
        ([[1, 3], 2], PAIRS),
        ([["1", "3"]], PAIRS),
        (["13"], PAIRS),
        ([None], PAIRS),
        ([[1, 3, 6]], PAIRS),
    ],
)
def test_layers_that_are_not_there_are_refused(layers: list[Any], complaint: str) -> None:
    assert refusal(given, 4, 12, layers=layers) == f"{KEY}.layers={layers}: {complaint}"
