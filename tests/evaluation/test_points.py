"""The evaluation of points: an exact sampler is near the floor, and what the others lack."""

from pathlib import Path
from typing import Any

import pytest
import torch
from generators import POINTS, data_of, point_generator, ring_mixture, saved
from PIL import Image
from torch import Tensor

from stillhouse.diffusion.oracles import GaussianMixture
from stillhouse.evaluation.language_models import Evaluated
from stillhouse.evaluation.points import points
from stillhouse.records.diffusion import Condition

MANY = POINTS | {"held_out_points": 1500}


def evaluated(models: dict[str, str], source: dict[str, Any] = MANY, **changes: Any) -> Evaluated:
    settings = {
        "mixture": ring_mixture(),
        "guidance_scale": 1.0,
        "teacher_steps": [60, 1],
        "seed": 0,
        "speed_repeats": 1,
    }
    data = data_of(source, evaluation_batch_size=1500)
    return points(models, data, **(settings | changes))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Evaluated:
    folder = tmp_path_factory.mktemp("student")
    path = saved(point_generator(), folder, POINTS, {"1": [1.5708]})
    return evaluated({"student": path})


def test_rows_and_numbers(found: Evaluated) -> None:
    assert list(found.models) == ["floor", "teacher@60", "teacher@1", "student@1"]
    quality = {"sliced_wasserstein", "covered_modes", "off_mode_share", "class_consistency"}
    cost = {"network_calls", "latency_ms"}
    assert found.models["floor"].keys() == quality
    assert found.models["teacher@60"].keys() == quality | cost
    assert found.models["student@1"].keys() == quality | cost | {"parameters"}
    assert [found.models[row]["network_calls"] for row in list(found.models)[1:]] == [60, 1, 1]


def test_an_exact_sampler_is_near_the_floor(found: Evaluated) -> None:
    floor, exact = found.models["floor"], found.models["teacher@60"]
    assert 0 < floor["sliced_wasserstein"] < 0.1
    assert exact["sliced_wasserstein"] < floor["sliced_wasserstein"] + 0.05
    for row in (floor, exact):
        assert row["covered_modes"] == 1
        # 0.03 % of a Gaussian in the plane lie beyond four of its deviations.
        assert row["off_mode_share"] < 0.005
        assert row["class_consistency"] > 0.995


def test_one_step_of_the_flow_falls_between_the_modes(found: Evaluated) -> None:
    """The mean of a class, whose two modes lie opposite each other: no sample is on any."""
    row = found.models["teacher@1"]
    assert row["sliced_wasserstein"] > 0.8
    assert row["covered_modes"] == 0
    assert row["off_mode_share"] == 1
    assert row["class_consistency"] == 0


class Says(GaussianMixture):
    """The exact answers for another condition than was asked for."""

    def __init__(self, shift: int) -> None:
        known = ring_mixture()
        super().__init__(known.means.tolist(), known.deviations.tolist(), None, [0] * 8)
        self.labels.copy_(known.labels)
        self.shift = shift

    def forward(self, x_t: Tensor, t: Tensor, condition: Condition, scale: Any = None) -> Tensor:
        assert condition.labels is not None
        said = torch.full_like(condition.labels, -1)
        if self.shift >= 0:
            said = (condition.labels + self.shift) % 4
        return super().forward(x_t, t, Condition(labels=said), scale)


@pytest.mark.parametrize(
    ("shift", "share"), [(0, 1.0), (1, 0.0), (-1, 0.25)], ids=["asked", "another", "any"]
)
def test_the_share_of_the_right_class(shift: int, share: float) -> None:
    """All samples lie on modes: of the classes asked for, of others, or of whatever classes."""
    row = evaluated({}, mixture=Says(shift), teacher_steps=[40]).models["teacher@40"]
    assert row["class_consistency"] == pytest.approx(share, abs=0.03)
    assert row["covered_modes"] == 1
    assert row["off_mode_share"] < 0.01


def test_a_guided_teacher_is_asked_twice() -> None:
    found = evaluated({}, guidance_scale=2.0, teacher_steps=[4]).models
    assert found["teacher@4"]["network_calls"] == 8


def test_the_picture_has_every_row(found: Evaluated, tmp_path: Path) -> None:
    file = found.pictures["samples"](tmp_path / "samples.png")
    assert file == tmp_path / "samples.png"
    with Image.open(file) as picture:
        colours = picture.convert("RGB").getcolors(100_000)
        assert picture.size[0] > 600
    assert colours is not None
    assert len(colours) > 20
    (few,) = evaluated({}, POINTS, teacher_steps=[1]).pictures.values()
    assert few(tmp_path / "few.png").stat().st_size < file.stat().st_size


def test_points_that_are_not_in_a_plane_are_not_drawn() -> None:
    line = {"_target_": "stillhouse.data.pictures.mixtures.gaussian", "mean": [0.6]}
    mixture = GaussianMixture([[0.6]], [0.4])
    found = evaluated({}, POINTS | {"mixture": line}, mixture=mixture)
    assert not found.pictures
    assert found.models["floor"]["covered_modes"] == 1
