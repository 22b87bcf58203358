"""A killed training of a few-step generator goes on bit for bit: student, average, optimiser."""

import io
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from generators import POINTS, RING, node_of, point_generator
from kills import kill_at, same, started
from rich.console import Console
from safetensors.torch import load_file

from stillhouse.families.checkpoints import latest_checkpoint, step_of
from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.stages.fit import Fit
from stillhouse.stages.stage import StageContext
from stillhouse.tracking.tracker import FileTracker

STEPS = 80
# Of a student that takes turns from the fifth on: 5 + 3 * 25 steps are as many.
UPDATES = 30


def partial_of(target: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": target, "_partial_": True, **settings}


def method() -> dict[str, Any]:
    """Return sCM with everything that is drawn: times, noise, scales."""
    diffusion, objectives = "stillhouse.diffusion", "stillhouse.objectives.consistency"
    loss = partial_of(
        "stillhouse.families.timestep.consistency.consistency",
        tangent=partial_of(f"{diffusion}.tangents.functional"),
        form=partial_of(f"{objectives}.scm_tangent"),
        weighting=partial_of(f"{objectives}.by_noise"),
    )
    return partial_of(
        "stillhouse.families.timestep.scm.scm",
        loss=loss,
        times=partial_of(f"{diffusion}.times.log_normal"),
        guidance_scale=partial_of(f"{diffusion}.guidance.one_of", scales=[1.0, 2.0, 3.0]),
        warmup_steps=30,
    )


def turns() -> dict[str, Any]:
    """Return rCM on the same, which draws lengths and times of rollouts besides."""
    family, diffusion = "stillhouse.families.timestep", "stillhouse.diffusion"
    drawn = partial_of(f"{diffusion}.times.log_normal")
    weighting = "stillhouse.objectives.distribution_matching.by_teacher_error"
    rollout = partial_of(f"{family}.rollouts.falling", times=drawn, most_steps=3)
    consistency = method() | {"warmup_steps": 5}
    student = partial_of(
        f"{family}.rcm.student",
        consistency=consistency,
        consistency_weight=1.0,
        rollout=rollout,
        guidance_scale=consistency["guidance_scale"],
        matching=partial_of(
            f"{family}.matching.score_difference", times=drawn, weighting=partial_of(weighting)
        ),
        matching_weight=0.5,
        matching_from=5,
    )
    critic = partial_of(
        f"{family}.matching.critic",
        rollout=rollout,
        guidance_scale=consistency["guidance_scale"],
        times=drawn,
        weighting=partial_of("stillhouse.objectives.consistency.even"),
    )
    return {"student": student, "critic": critic}


def begun(teacher: Any) -> Any:
    """A fake score for a teacher that has no weights."""
    return point_generator()


def fit(alone: bool) -> Fit:
    students = "stillhouse.students.denoisers"
    optimizer = partial_of("stillhouse.families.optimizers.adamw", learning_rate=0.01)
    phase = {"trains": ["fake_score"], "updates": 2, "from_update": 5, "optimizer": optimizer}
    phase |= {"_target_": "stillhouse.families.timestep.turns.Turn"}
    beside = {"phases": {"critic": phase}, "fake_score": partial_of("test_killed.begun")}
    family = partial_of(
        "stillhouse.families.timestep.module.TimestepDistiller",
        times={"1": [1.5708]},
        guidance_scale=1.0,
        takes_tangents=True,
        learnt_weighting=True,
        _convert_="all",
        **({} if alone else beside),
    )
    trainer = partial_of(
        "lightning.pytorch.Trainer",
        max_steps=STEPS if alone else UPDATES,
        val_check_interval=30 if alone else 12,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=2,
        accelerator="cpu",
        enable_model_summary=False,
    )
    checkpoint = "stillhouse.families.checkpoints.ResumeCheckpoint"
    return Fit(
        family=family,
        method=method() if alone else turns(),
        teacher=partial_of("stillhouse.teachers.denoisers.gaussian_mixture", mixture=RING),
        student=partial_of(
            f"{students}.point_network", width=8, num_layers=1, guidance_embeds=True
        ),
        data=node_of(POINTS),
        optimizer=optimizer,
        trainer=trainer,
        callbacks={"checkpoint": {"_target_": checkpoint, "checkpoint_every_n_steps": 3}},
        # In this order: what training has at its end, before the average takes its place.
        own_callbacks={
            "kept": {"_target_": "test_killed.Kept"},
            "ema": {"_target_": "stillhouse.families.ema.MovingAverage", "decay": 0.9},
        },
    )


class Kept(pl.Callback):
    """Writes what training has at its end to a file."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TimestepDistiller)
        assert pl_module.log_variance is not None
        (optimizer,) = trainer.optimizers
        kept = {
            "student": pl_module.student.state_dict(),
            "log_variance": pl_module.log_variance.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        if pl_module.fake_score is not None:
            kept["fake_score"] = pl_module.fake_score.state_dict()
        torch.save(kept, Path(trainer.default_root_dir) / "kept.pt")


def train(folder: str, how: str) -> None:
    """Train to the end, or go on from the last checkpoint in a folder."""
    scratch = Path(folder)
    output = scratch / "output"
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tracker = FileTracker(None)
    fit(how == "alone")(StageContext("fit", output, scratch, tracker, Console(file=io.StringIO())))


@pytest.mark.parametrize("how", ["alone", pytest.param("in turns", marks=pytest.mark.slow)])
def test_killed_and_gone_on_with_equals_uninterrupted(tmp_path, monkeypatch, how: str) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(str(whole), how)

    def step() -> int:
        found = latest_checkpoint(broken)
        return 0 if found is None else step_of(found)

    kill_at(started(train, str(broken), how), random.randint(3, 60), step)
    assert 3 <= step() < STEPS
    train(str(broken), how)
    exported = [
        load_file(f / "output/transformer/diffusion_pytorch_model.safetensors")
        for f in (broken, whole)
    ]
    assert same(*exported), "the average"
    found, expected = (torch.load(f / "kept.pt", weights_only=True) for f in (broken, whole))
    assert set(expected) - {"fake_score"} == {"student", "log_variance", "optimizer"}
    for name, kept in expected.items():
        assert same(found[name], kept), name
    moments = [state["exp_avg"] for state in expected["optimizer"]["state"].values()]
    networks = [kept for name, kept in expected.items() if name != "optimizer"]
    assert len(moments) == sum(len(kept) for kept in networks)
    assert len(networks) == (2 if how == "alone" else 3)
    assert expected["log_variance"]["line.bias"] != 0
    trained = expected["student"]["network.model.embed.weight"]
    assert not torch.equal(trained, exported[1]["embed.weight"])
