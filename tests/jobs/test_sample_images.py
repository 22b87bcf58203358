"""The jobs `sample` and `export` for generators: pictures of classes, and what the card says."""

from pathlib import Path

import pytest
from commands import TINY, only_run, run_here
from PIL import Image

SAMPLE = ("--config-name", "sample")


@pytest.fixture
def points(capfd, here: Path) -> Path:
    done = run_here(capfd, *TINY, "experiment=scm_points")
    assert done.code == 0, done.err
    return only_run(here / "outputs")


def test_classes_are_drawn(capfd, here: Path, points: Path) -> None:
    asked = (f"run={points}", "classes=[1,3]", "num_inference_steps=2", "num_images=6")
    done = run_here(capfd, *SAMPLE, *asked)
    assert done.code == 0, done.err
    assert done.out == "sample: samples.png: 6 samples of student a line, 1, 3\n"
    first = (here / "sample" / "samples.png").read_bytes()
    with Image.open(here / "sample" / "samples.png") as picture:
        assert picture.size[0] > 400
    again = run_here(capfd, *SAMPLE, *asked)
    assert again.code == 0
    assert (here / "sample" / "samples.png").read_bytes() == first


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "classes=[7]",
            "classes=7: student has no such class; expected 0, 1, 2, 3",
        ),
        (
            "num_inference_steps=3",
            "num_inference_steps=3: expected 1 or 2 or 4, whose times are known",
        ),
        ("num_images=0", "num_images=0: expected 1 or more"),
        (
            "prompts=[a cat]",
            "prompts: student is a generator that is told classes; expected 'classes=[…]'",
        ),
    ],
)
def test_bad_input(capfd, here: Path, points: Path, override: str, message: str) -> None:
    done = run_here(capfd, *SAMPLE, f"run={points}", override)
    assert done.code == 2
    assert done.err == f"error: {message}\n"
    assert not (here / "sample").exists()


def test_the_card_says_how_to_load_it(capfd, here: Path, points: Path) -> None:
    done = run_here(capfd, "--config-name", "export", f"run={points}", "to=home")
    assert done.code == 0, done.err
    card = (here / "home" / "README.md").read_text()
    assert (
        'pipeline = DiffusionPipeline.from_pretrained("<this folder>", trust_remote_code=True)\n'
        "samples = pipeline(class_labels=[0, 1], num_inference_steps=1).images\n"
    ) in card
    assert "- a mixture of Gaussians, licence: none needed" in card
    assert "tangent=functional(), form=scm_tangent(), weighting=by_noise()" in card
    assert "_target_" not in card
