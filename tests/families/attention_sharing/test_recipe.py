"""The recipe `echoatt`: what is set for the student holds for the arms that it is compared with."""

from typing import Any

import pytest
from commands import ROOT

from stillhouse.config import preflight
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import register_resolvers

ARMS = ("distil", "continue", "continual", "random_distil", "random_continue")
OVERRIDES = (
    "trainer=ddp",
    "trainer.accumulate_grad_batches=2",
    "trainer.precision=bf16-mixed",
    "optimizer.weight_decay=0.3",
    "data.batch_size=3",
)


def stages(*overrides: str) -> Any:
    register_schemas()
    register_resolvers()
    return preflight.compose_job(["experiment=echoatt", *overrides], ROOT / "conf").stages


def test_all_arms_train_alike() -> None:
    nodes = stages(*OVERRIDES)
    for part, own in (
        ("trainer", {"max_steps"}),
        ("optimizer", {"learning_rate"}),
        ("data", set()),
    ):
        wanted = {k: v for k, v in nodes.distil[part].items() if k not in own}
        for arm in ARMS:
            assert {k: v for k, v in nodes[arm][part].items() if k not in own} == wanted, arm


@pytest.mark.parametrize(("steps", "second"), [(160, 40), (1000, 250), (1, 1)])
def test_arms_take_equally_many_steps(steps: int, second: int) -> None:
    nodes = stages(f"trainer.max_steps={steps}")
    taken = {arm: nodes[arm].trainer.max_steps for arm in ARMS}
    assert taken["continue"] == taken["random_continue"] == second
    assert taken["random_distil"] == steps
    if steps > 1:
        assert taken["distil"] + taken["continue"] == taken["continual"]


def test_losses_and_the_random_arm_follow_a_choice_by_hand() -> None:
    nodes = stages("student.sharing_path=my/sharing.json")
    assert nodes.distil.family.layers.sharing_path == "my/sharing.json"
    assert nodes.distil.teacher.layers.sharing_path == "my/sharing.json"
    assert nodes.random_sharing.choose.like_path == "my/sharing.json"
    own = nodes.random_distil
    assert own.family.layers == own.teacher.layers
    assert own.teacher.layers.sharing_path == own.student.sharing_path == "stages/random_sharing"
