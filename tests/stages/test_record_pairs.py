"""The stage `record_pairs`: what a store holds, what it costs, and what a kill leaves of it."""

import io
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from generators import DIGITS, POINTS, data_of, node_of, point_generator, saved
from kills import kill_at, started
from rich.console import Console
from torch import Tensor

from stillhouse.data.pairs import read_pairs
from stillhouse.data.stream import generator_for
from stillhouse.diffusion.solvers import ddim, heun, uniform_grid
from stillhouse.errors import UserError
from stillhouse.files import content_hash
from stillhouse.records.diffusion import Condition
from stillhouse.stages.record_pairs import RecordPairs
from stillhouse.stages.stage import StageContext
from stillhouse.students.denoiser_folders import load_denoiser
from stillhouse.students.denoisers import Denoiser
from stillhouse.tracking.tracker import FileTracker

SEED, STEPS = 3, 4


def stage(path: str, **changes: Any) -> RecordPairs:
    settings = {
        "path": path,
        "data": node_of(POINTS),
        "solver": {"_target_": "stillhouse.diffusion.solvers.heun", "_partial_": True},
        "steps": STEPS,
        "guidance_scale": 1.0,
        "count": 13,
        "batch_size": 5,
        "seed": SEED,
    }
    return RecordPairs(**(settings | changes))


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    return saved(point_generator(), tmp_path / "teacher", POINTS)


def by_hand(
    network: Denoiser, place: int, label: Tensor, scale: float = 1.0, solver: Any = heun
) -> Tensor:
    """Return the sample of one noise and one label, alone."""
    noise = torch.randn(2, generator=generator_for(SEED, place))

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        said, none = (network(x, t, Condition(labels=c)) for c in (label[None], None))
        return said if scale == 1 else none + scale * (said - none)

    with torch.no_grad():
        return solver(velocity, noise[None], uniform_grid(STEPS))[0]


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_a_sample_is_what_the_solver_makes_of_its_noise(stage_context, teacher, batch_size) -> None:
    context = stage_context("pairs")
    result = stage(teacher, batch_size=batch_size)(context)
    found = read_pairs(str(context.output), key="")
    assert len(found.x_0) == 13
    network = load_denoiser(teacher, key="").eval()
    labels = data_of(POINTS).source.splits["train"].labels
    assert labels is not None
    for place in range(13):
        torch.testing.assert_close(found.x_0[place], by_hand(network, place, labels[place]))
    assert result.metrics["pairs"] == 13
    assert found.facts.teacher == content_hash(Path(teacher))
    assert (found.facts.seed, found.facts.steps, found.facts.guidance_scale) == (SEED, STEPS, 1.0)


def test_another_solver(stage_context, teacher) -> None:
    context = stage_context("pairs")
    node = {"_target_": "stillhouse.diffusion.solvers.ddim", "_partial_": True}
    stage(teacher, solver=node)(context)
    found = read_pairs(str(context.output), key="")
    assert found.condition.labels is not None
    network, label = load_denoiser(teacher, key="").eval(), found.condition.labels[7]
    torch.testing.assert_close(found.x_0[7], by_hand(network, 7, label, solver=ddim))
    assert (found.x_0[7] - by_hand(network, 7, label)).norm() > 1e-3


def test_conditions_go_round_the_training_labels(stage_context, teacher) -> None:
    context = stage_context("pairs")
    few = node_of(POINTS, max_train_samples=6)
    stage(teacher, data=few)(context)
    found = read_pairs(str(context.output), key="").condition.labels
    labels = data_of(POINTS).source.splits["train"].labels
    assert labels is not None
    assert found is not None
    assert found.tolist() == [*labels[:6].tolist() * 2, int(labels[0])]


@pytest.mark.parametrize(
    ("solver", "scale", "calls"), [("heun", 1.0, 7), ("heun", 2.0, 14), ("ddim", 2.0, 8)]
)
def test_guidance_asks_twice(stage_context, teacher, monkeypatch, solver, scale, calls) -> None:
    """What is reported is what the network was asked, counted by sample."""
    asked: list[int] = []
    forward = Denoiser.forward

    def counted(self: Denoiser, x: Tensor, *arguments: Any) -> Tensor:
        asked.append(len(x))
        return forward(self, x, *arguments)

    monkeypatch.setattr(Denoiser, "forward", counted)
    context = stage_context("pairs")
    node = {"_target_": f"stillhouse.diffusion.solvers.{solver}", "_partial_": True}
    result = stage(teacher, guidance_scale=scale, solver=node)(context)
    assert result.metrics["network_calls"] == sum(asked) == 13 * calls
    monkeypatch.undo()
    found = read_pairs(str(context.output), key="")
    assert found.facts.guidance_scale == scale
    assert found.condition.labels is not None
    label, network = found.condition.labels[4], load_denoiser(teacher, key="").eval()
    way = {"heun": heun, "ddim": ddim}[solver]
    torch.testing.assert_close(found.x_0[4], by_hand(network, 4, label, scale, way))


def test_what_stands_is_not_made_again(stage_context, teacher) -> None:
    whole, broken = stage_context("whole"), stage_context("broken")
    stage(teacher)(whole)
    shards = sorted((whole.scratch / "shards").iterdir())
    assert [shard.name[:8] for shard in shards] == ["00000000", "00000005", "00000010"]
    stage(teacher, guidance_scale=3.0)(broken)
    kept = broken.scratch / "shards" / shards[1].name
    for shard in shards:
        if shard.name != kept.name:
            (broken.scratch / "shards" / shard.name).unlink()
    stage(teacher)(broken)
    ours, theirs = (read_pairs(str(c.output), key="").x_0 for c in (broken, whole))
    same = (ours == theirs).all(1)
    assert same.tolist() == [True] * 5 + [False] * 5 + [True] * 3


LONG = {"count": 160, "batch_size": 2, "steps": 8}


def record(folder: str, teacher: str) -> None:
    """Record many shards, as a process of its own does."""
    scratch = Path(folder)
    (scratch / "output").mkdir(exist_ok=True)
    console = Console(file=io.StringIO())
    context = StageContext("pairs", scratch / "output", scratch, FileTracker(None), console)
    stage(teacher, **LONG)(context)


def test_killed_and_run_again_equals_uninterrupted(tmp_path, teacher) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    record(str(whole), teacher)

    def shards() -> dict[Path, int]:
        found = (broken / "shards").glob("*.safetensors")
        return {path: path.stat().st_mtime_ns for path in found}

    kill_at(started(record, str(broken), teacher), random.randint(2, 50), lambda: len(shards()))
    left = shards()
    assert len(left) < 80
    record(str(broken), teacher)
    assert left.items() <= shards().items(), "what stands is not made again"
    names = sorted(p.name for p in (whole / "output").iterdir())
    assert names == ["pairs.json", "pairs.safetensors"]
    for name in names:
        assert (whole / "output" / name).read_bytes() == (broken / "output" / name).read_bytes()


def test_bad_input(stage_context, teacher, tmp_path) -> None:
    def refusal(path: str, **changes: Any) -> str:
        with pytest.raises(UserError) as refused:
            stage(path, **changes)(stage_context("pairs"))
        return str(refused.value)

    assert refusal(str(tmp_path)) == (
        f"stages.pairs.path={tmp_path}: no model_index.json can be read there; expected the model "
        "folder of a run of the family timestep"
    )
    assert refusal(teacher, data=node_of(DIGITS)) == (
        f"stages.pairs.path={teacher}: its samples are 2, those of data are 1 x 8 x 8"
    )
    assert refusal(teacher, data=node_of({"_target_": "generators.lacking", "split": "train"})) == (
        "data.source: a folder has no samples for train"
    )
