"""A killed training of a few-step generator goes on bit for bit: student, average, optimiser."""

import io
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from generators import POINTS, RING, node_of
from kills import kill_at, started
from rich.console import Console
from safetensors.torch import load_file

from stillhouse.families.checkpoints import latest_checkpoint, step_of
from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.stages.fit import Fit
from stillhouse.stages.stage import StageContext
from stillhouse.tracking.tracker import FileTracker

STEPS = 80


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


def fit() -> Fit:
    students = "stillhouse.students.denoisers"
    family = partial_of(
        "stillhouse.families.timestep.module.TimestepDistiller",
        times={"1": [1.5708]},
        guidance_scale=1.0,
        takes_tangents=True,
        learnt_weighting=True,
    )
    trainer = partial_of(
        "lightning.pytorch.Trainer",
        max_steps=STEPS,
        val_check_interval=30,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=2,
        accelerator="cpu",
        enable_model_summary=False,
    )
    checkpoint = "stillhouse.families.checkpoints.ResumeCheckpoint"
    return Fit(
        family=family,
        method=method(),
        teacher=partial_of("stillhouse.teachers.denoisers.gaussian_mixture", mixture=RING),
        student=partial_of(
            f"{students}.point_network", width=8, num_layers=1, guidance_embeds=True
        ),
        data=node_of(POINTS),
        optimizer=partial_of("stillhouse.families.optimizers.adamw", learning_rate=0.01),
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
        torch.save(kept, Path(trainer.default_root_dir) / "kept.pt")


def train(folder: str) -> None:
    """Train to the end, or go on from the last checkpoint in a folder."""
    scratch = Path(folder)
    output = scratch / "output"
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    tracker = FileTracker(None)
    fit()(StageContext("fit", output, scratch, tracker, Console(file=io.StringIO())))


def same(found: Any, expected: Any) -> bool:
    """Compare nested dicts and lists of tensors bit for bit."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return all(same(a, b) for a, b in zip(found, expected, strict=True))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected


def test_killed_and_gone_on_with_equals_uninterrupted(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(str(whole))

    def step() -> int:
        found = latest_checkpoint(broken)
        return 0 if found is None else step_of(found)

    kill_at(started(train, str(broken)), random.randint(3, 60), step)
    assert 3 <= step() < STEPS
    train(str(broken))
    exported = [
        load_file(f / "output/transformer/diffusion_pytorch_model.safetensors")
        for f in (broken, whole)
    ]
    assert same(*exported), "the average"
    found, expected = (torch.load(f / "kept.pt", weights_only=True) for f in (broken, whole))
    for name in ("student", "log_variance", "optimizer"):
        assert same(found[name], expected[name]), name
    moments = [state["exp_avg"] for state in expected["optimizer"]["state"].values()]
    assert len(moments) == len(expected["student"]) + 2
    assert expected["log_variance"]["line.bias"] != 0
    trained = expected["student"]["network.model.embed.weight"]
    assert not torch.equal(trained, exported[1]["embed.weight"])
