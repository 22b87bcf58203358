"""The debug overlay: wherever a leaf of that name stands, save where the user set it."""

import pytest
from omegaconf import OmegaConf

from stillhouse.config import overlay
from stillhouse.errors import UserError


def config():
    return OmegaConf.create(
        {
            "leave_out": [],
            "debug": {"everywhere": {"max_steps": 2, "limit": 5}},
            "trainer": {"max_steps": 300, "limit": None},
            "stages": {
                "teacher": {"trainer": {"max_steps": 900}, "list": [{"max_steps": 7}]},
                "student": {"trainer": "${trainer}"},
            },
        }
    )


def test_every_leaf_of_the_name_is_set_and_interpolations_stay() -> None:
    laid = config()
    overlay.apply(laid, set())
    assert laid.trainer == {"max_steps": 2, "limit": 5}
    assert laid.stages.teacher.trainer.max_steps == 2
    assert laid.stages.teacher.list[0].max_steps == 2
    assert OmegaConf.is_interpolation(laid.stages.student, "trainer")
    assert laid.stages.student.trainer.max_steps == 2


def test_a_stage_of_that_name_is_no_leaf() -> None:
    laid = config()
    laid.debug.everywhere.teacher = 3
    laid.stages.student.teacher = 900
    overlay.apply(laid, set())
    assert laid.stages.teacher.trainer.max_steps == 2
    assert laid.stages.student.teacher == 3


def test_what_the_user_set_wins() -> None:
    laid = config()
    laid.trainer.max_steps = 40
    overlay.apply(laid, {"trainer.max_steps"})
    assert laid.trainer.max_steps == 40
    assert laid.stages.teacher.trainer.max_steps == 2


def test_no_overlay_changes_nothing() -> None:
    plain = config()
    plain.debug = None
    before = OmegaConf.to_yaml(plain)
    overlay.apply(plain, set())
    assert OmegaConf.to_yaml(plain) == before


def test_stages_that_are_left_out_are_null() -> None:
    laid = config()
    laid.leave_out = ["student"]
    overlay.apply(laid, set())
    assert laid.stages.student is None
    assert laid.stages.teacher.trainer.max_steps == 2
    laid.leave_out = ["techer"]
    with pytest.raises(UserError) as refused:
        overlay.apply(laid, set())
    assert str(refused.value) == (
        "leave_out=[techer]: this recipe has no stage of that name; its stages are teacher, "
        "student; did you mean 'teacher'?"
    )


def test_what_other_stages_take_from_one_that_is_left_out_stays() -> None:
    laid = config()
    laid.stages.student.text = {"words": 3, "more": "${trainer.limit}"}
    laid.stages.teacher.text = "${stages.student.text}"
    laid.stages.teacher.inner = {"words": "${stages.student.text.words}"}
    laid.leave_out = ["student"]
    overlay.apply(laid, set())
    assert laid.stages.student is None
    assert laid.stages.teacher.text == {"words": 3, "more": 5}
    assert laid.stages.teacher.inner == {"words": 3}
