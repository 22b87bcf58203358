"""Networks that take turns, through Lightning: what learns when, and what is counted and kept."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from commands import TINY, run_here
from generators import (
    DIGITS,
    POINTS,
    data_of,
    digit_generator,
    node_of,
    point_generator,
    ring_mixture,
    saved,
)
from kills import same
from phase_stages import (
    ADAM,
    CYCLES,
    HEADS,
    LEARNT,
    NETWORKS,
    TwoCycles,
    Watch,
    descent,
    everything,
    parts_of,
    taking_turns_by,
)
from sharded_trainers import Sharing
from torch import Tensor
from training import bare_trainer

from stillhouse.diffusion.guidance import fixed
from stillhouse.diffusion.times import shifted_uniform, uniform
from stillhouse.errors import UserError
from stillhouse.families.ema import MovingAverage
from stillhouse.families.timestep import dmd2
from stillhouse.families.timestep.matching import score_difference
from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.families.timestep.networks import Phase
from stillhouse.families.timestep.rollouts import backward_simulation
from stillhouse.families.timestep.turns import Turn
from stillhouse.objectives.adversarial import non_saturating
from stillhouse.objectives.consistency import even
from stillhouse.objectives.distribution_matching import by_teacher_error
from stillhouse.records.losses import LossTerms
from stillhouse.stages.fit import Fit
from stillhouse.teachers.fake_scores import lora, pretrained


def fitted(
    module: TimestepDistiller, folder: Path, *, updates: int = 2, size: int = 4, **options: Any
) -> pl.Trainer:
    """Train it for so many updates of the student."""
    steps = module.turns.steps(updates)
    options = {"max_steps": steps, "limit_val_batches": 0} | options
    ckpt_path = options.pop("ckpt_path", None)
    trainer = bare_trainer(folder, **options)
    data = data_of(POINTS, batch_size=size)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before if not same(after[name], before[name])}


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}])
def test_only_those_whose_turn_it_is_learn(tmp_path, options: dict[str, Any]) -> None:
    """Bit for bit, though every network is in every loss, momenta go on and weights decay."""
    module, watch = taking_turns_by(), Watch()
    trainer = fitted(module, tmp_path, updates=2, **options, callbacks=[watch])
    assert trainer.global_step == len(CYCLES) == len(watch.seen) - 1
    for name, (before, after) in zip(CYCLES, pairwise(watch.seen), strict=True):
        assert changed(before, after) == LEARNT[name]


def test_the_norm_that_is_clipped_is_that_of_the_phase(tmp_path) -> None:
    module, watch = taking_turns_by(optimizer=descent), Watch()
    fitted(module, tmp_path, gradient_clip_val=0.1, callbacks=[watch])
    for before, after in pairwise(watch.seen):
        moves = [(after[n][k] - before[n][k]).flatten() for n in before for k in before[n]]
        assert float(torch.cat(moves).norm()) == pytest.approx(0.1, rel=1e-4)


def test_halves_of_a_window_are_a_whole_batch_in_every_phase(tmp_path) -> None:
    seen = []
    for size, parts in ((8, 1), (4, 2)):
        module, watch = taking_turns_by(optimizer=descent), Watch()
        options = {"gradient_clip_val": 0.1, "accumulate_grad_batches": parts}
        fitted(module, tmp_path, size=size, **options, callbacks=[watch])
        assert module.units_seen == 2 * 8, "of the student's updates only"
        seen.append(watch.seen)
    torch.testing.assert_close(*seen)


def test_a_method_is_told_the_cycle_and_a_phase_logs_by_its_name(tmp_path) -> None:
    called: list[tuple[str, Phase]] = []

    def noted(name: str) -> Any:
        def method(networks: Any, batch: Any, phase: Phase, generator: Any) -> LossTerms:
            called.append((name, phase))
            return everything(networks, batch, phase, generator)

        return method

    module = taking_turns_by({name: noted(name) for name in LEARNT})
    trainer = fitted(module, tmp_path, accumulate_grad_batches=2)
    cycles, turns = [0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 3, 0]
    phases = [Phase(cycle, 2, turn) for cycle, turn in zip(cycles, turns, strict=True)]
    each = list(zip(CYCLES, phases, strict=True))
    assert called == [one for one in each for _ in range(2)]
    names = {
        f"train_{phase}{term}" for phase in ("", "critic_", "judge_") for term in ("loss", "size")
    }
    assert set(trainer.callback_metrics) == names


class Validated(pl.Callback):
    """Notes the student that a validation sees, and the step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, Tensor]]] = []

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TimestepDistiller)
        self.seen.append((trainer.global_step, parts_of(pl_module)["student"]))


def test_the_average_moves_once_an_update_of_the_student_and_is_seen_in_every_phase(
    tmp_path,
) -> None:
    """Behind a critic's step it is validated, and handed on behind the last."""
    module, watch, validated = taking_turns_by(), Watch(), Validated()
    average = MovingAverage(decay=0.5)
    options = {"val_check_interval": 1, "check_val_every_n_epoch": None, "limit_val_batches": 1}
    fitted(module, tmp_path, **options, callbacks=[watch, average, validated])
    expected, averages = dict(watch.seen[0]["student"]), []
    for step, name in enumerate(CYCLES, 1):
        if name == "student":
            share = min(0.5, (1 + step // 3 + 1) / (10 + step // 3 + 1))
            new = watch.seen[step]["student"]
            expected = {n: share * t + (1 - share) * new[n] for n, t in expected.items()}
        averages.append((step, expected))
    torch.testing.assert_close(validated.seen, averages)
    torch.testing.assert_close(parts_of(module)["student"], averages[-1][1])
    assert changed(averages[-1][1], watch.seen[-1]["student"])


def by_dmd2() -> dict[str, Any]:
    """DMD2's losses, which draw steps, times and noise, by the names of the phases."""
    rollout = partial(backward_simulation, times=[1.5708, 0.9])
    common = {
        "rollout": rollout,
        "guidance_scale": fixed,
        "adversarial": non_saturating(),
        "adversarial_times": uniform,
        "adversarial_weight": 0.1,
    }
    matching = partial(score_difference, times=shifted_uniform, weighting=by_teacher_error)
    critic = partial(dmd2.critic, times=shifted_uniform, weighting=even, **common)
    student = partial(dmd2.student, matching=matching, **common)
    return {"student": student, "critic": critic, "judge": critic}


class Keep(pl.Callback):
    """Writes a checkpoint behind every step, as it is in every phase."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        path = Path(trainer.default_root_dir) / f"step={trainer.global_step}.ckpt"
        if not path.exists():
            trainer.save_checkpoint(path)


def test_a_run_goes_on_from_any_step_of_a_cycle(tmp_path) -> None:
    """Bit for bit: every network, the average, the optimiser's state, and what is counted."""
    build = partial(taking_turns_by, by_dmd2(), learnt_weighting=False)
    whole, average = build(), MovingAverage(decay=0.5)
    options: dict[str, Any] = {"updates": 2, "accumulate_grad_batches": 2}
    end = fitted(whole, tmp_path, **options, callbacks=[Watch(), average, Keep()])
    for step in range(1, len(CYCLES)):
        resumed, its_average = build(), MovingAverage(decay=0.5)
        path = tmp_path / f"step={step}.ckpt"
        again = fitted(resumed, tmp_path, **options, callbacks=[its_average], ckpt_path=path)
        assert not changed(parts_of(whole), parts_of(resumed)), step
        assert same(its_average.state_dict(), average.state_dict()), step
        (found,), (expected,) = again.optimizers, end.optimizers
        assert same(found.state_dict(), expected.state_dict()), step
        assert resumed.units_seen == whole.units_seen == 2 * 8


def kept_names(module: TimestepDistiller, folder: Path) -> set[str]:
    fitted(module, folder, callbacks=[Keep()])
    found = torch.load(folder / f"step={len(CYCLES)}.ckpt", weights_only=True)["state_dict"]
    names = {n for n, _ in module.named_parameters() if not n.startswith("teacher.")}
    assert names <= set(found)
    return set(found)


def test_a_checkpoint_holds_what_learns_and_no_teacher(tmp_path) -> None:
    names = kept_names(taking_turns_by(), tmp_path)
    assert {n.partition(".")[0] for n in names} == set(NETWORKS) - {"teacher"}


def test_of_a_teacher_with_adapters_the_adapters_alone_are_kept(tmp_path) -> None:
    adapted = partial(lora, rank=2, alpha=2.0, target_modules=["embed", "head"])
    module, watch = taking_turns_by(fake_score=adapted), Watch()
    before = parts_of(module)["teacher"]
    names = kept_names(module, tmp_path)
    assert {n for n in names if n.startswith("fake_score")} == {
        f"fake_score.adapters.{i}.{part}" for i in (0, 1) for part in "AB"
    }
    assert not [n for n in names if n.startswith("teacher")]
    assert not changed(before, parts_of(module)["teacher"])
    again = taking_turns_by(fake_score=adapted)
    fitted(again, tmp_path, callbacks=[watch], ckpt_path=tmp_path / "step=3.ckpt")
    assert not changed(parts_of(module), parts_of(again))


@pytest.mark.slow
@pytest.mark.parametrize("sharing", list(Sharing))
@pytest.mark.filterwarnings("ignore:.*in distributed setting")
@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor")
def test_two_ranks_are_one_process_on_the_whole_batch_in_every_phase(
    stage_context, sharing: Sharing
) -> None:
    """With all weights on each of them, and sharing them (FSDP2), the teacher's too."""
    together, alone = (stage_context(f"on {devices}") for devices in (2, 1))
    metrics = TwoCycles(devices=2, sharing=sharing)(together).metrics
    assert metrics == pytest.approx(TwoCycles(devices=1)(alone).metrics, rel=1e-5)
    assert metrics["images_seen"] == 2 * 8
    expected = torch.load(alone.output / "seen_0.pt")
    seen = [torch.load(together.output / f"seen_{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(seen[0][-1], expected[-1], rtol=1e-4, atol=1e-6)
    assert len(expected) == len(CYCLES) + 1
    if sharing is not Sharing.NOTHING:
        return
    torch.testing.assert_close(seen[0], expected, rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(*seen, strict=True):
        assert not changed(ours, theirs), "ranks part"
    for name, (before, after) in zip(CYCLES, pairwise(seen[0]), strict=True):
        assert changed(before, after) == LEARNT[name]


def partial_of(target: str, **settings: Any) -> dict[str, Any]:
    return {"_target_": target, "_partial_": True, **settings}


def test_a_stages_budget_is_of_the_students_updates(
    tmp_path, stage_context, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two updates and a validation after each; a cycle is of three steps."""
    found: list[int] = []
    end = TimestepDistiller.on_validation_epoch_end

    def noted(module: TimestepDistiller) -> None:
        found.append(module.global_step)
        end(module)

    monkeypatch.setattr(TimestepDistiller, "on_validation_epoch_end", noted)
    optimizer = partial_of("stillhouse.families.optimizers.adamw", learning_rate=0.01)
    loss = partial_of("phase_stages.everything")
    phase = {"trains": ["fake_score", "discriminator"], "updates": 2, "from_update": 0}
    phase |= {"_target_": "stillhouse.families.timestep.turns.Turn", "optimizer": optimizer}
    head = partial_of("stillhouse.students.discriminators.mlp_head", hidden=4)
    features = {"features": ["network.model.layers.0"], "head": head}
    on_features = "stillhouse.students.discriminators.on_features"
    family = partial_of(
        "stillhouse.families.timestep.module.TimestepDistiller",
        _convert_="all",
        times={"1": [1.5708]},
        guidance_scale=1.0,
        takes_tangents=False,
        learnt_weighting=True,
        phases={"critic": phase},
        fake_score=partial_of("stillhouse.teachers.fake_scores.full_copy"),
        discriminator=partial_of(on_features, **features),
    )
    path = saved(point_generator(), tmp_path / "teacher", POINTS)
    budget = {"max_steps": 2, "val_check_interval": 1, "check_val_every_n_epoch": None}
    budget |= {"accelerator": "cpu", "enable_model_summary": False}
    fit = Fit(
        family=family,
        method={"student": loss, "critic": loss},
        teacher=partial_of("stillhouse.teachers.denoisers.denoiser", path=path),
        student=partial_of("stillhouse.students.denoiser_folders.pretrained", path=path),
        data=node_of(POINTS),
        optimizer=optimizer,
        trainer=partial_of("lightning.pytorch.Trainer", **budget),
    )
    metrics = fit(stage_context("distil")).metrics
    assert (metrics["steps"], metrics["images_seen"]) == (2, 2 * 4)
    assert found == [3, 6]


def turn(*trains: str) -> Turn:
    return Turn(trains=trains, updates=1, from_update=0, optimizer=ADAM)


TRAINS = "stages.<stage>.family.phases.judge.trains"
FEATURES = "stages.<stage>.family.discriminator.features"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"phases": {"judge": turn()}},
            f"{TRAINS}=[]: nothing in the phase learns; expected a network with weights",
        ),
        (
            {"phases": {"judge": turn("discriminators")}},
            f"{TRAINS}=['discriminators']: there is no discriminators; expected some of "
            "fake_score, discriminator; did you mean 'discriminator'?",
        ),
        (
            {"phases": {"judge": turn("discriminator")}, "discriminator": None},
            f"{TRAINS}=['discriminator']: stages.<stage>.family.discriminator=null; expected one, "
            "as conf/discriminator has them, or a phase without it",
        ),
        (
            {"phases": {"judge": turn("fake_score", "discriminator")}, "fake_score": None},
            f"{TRAINS}=['fake_score', 'discriminator']: stages.<stage>.family.fake_score=null; "
            "expected one, as conf/fake_score has them, or a phase without it",
        ),
        (
            {"method": {"student": everything, "critic": everything}},
            "method: it has losses for student, critic, the phases are student, critic, judge; "
            "expected stages.<stage>.family.phases with a phase for each loss besides the "
            "student's",
        ),
        (
            {"method": {"judge": everything}, "phases": {"judge": turn("discriminator")}},
            "method: it has losses for judge, the phases are student, judge; expected "
            "stages.<stage>.family.phases with a phase for each loss besides the student's",
        ),
        (
            {"discriminator": partial(HEADS, features=["network.model.layer.0"])},
            f"{FEATURES}=['network.model.layer.0']: heads stand on the fake score, else on the "
            "teacher; the one here, a PointNetwork, has no module network.model.layer.0; expected "
            "one such as network.model.layers.0; did you mean 'network.model.layers.0' or "
            "'network.model.layers' or 'network.model.head'?",
        ),
        (
            {"discriminator": partial(HEADS, features=[])},
            f"{FEATURES}=[]: expected the name of a module, such as network.model.layers.0",
        ),
        (
            {
                "teacher": ring_mixture(),
                "fake_score": None,
                "phases": {"judge": turn("discriminator")},
                "method": {"student": everything, "judge": everything},
            },
            f"{FEATURES}=['network.model.layers.0']: the teacher, a GaussianMixture, has no "
            "modules to read features of; expected teacher=denoiser",
        ),
        (
            {"teacher": None},
            "stages.<stage>.teacher=null: stages.<stage>.family.fake_score is made of the "
            "teacher; expected teacher=denoiser",
        ),
        (
            {"fake_score": partial(lora, rank=2, alpha=2.0, target_modules=["heads"])},
            "stages.<stage>.family.fake_score.target_modules=['heads']: the teacher has no linear "
            "layer heads; it has 0, 2, embed, head; did you mean 'head'?",
        ),
        (
            {"teacher": ring_mixture(), "fake_score": partial(pretrained, path="DIGITS")},
            "stages.<stage>.family.fake_score.path=DIGITS: its samples have the shape 1 x 8 x 8, "
            "the teacher's 2; expected a network that was trained on the teacher's data",
        ),
    ],
)
def test_turns_that_cannot_be_taken(here: Path, changes: dict[str, Any], message: str) -> None:
    saved(point_generator(), here / "POINTS", POINTS)
    saved(digit_generator(), here / "DIGITS", DIGITS)
    with pytest.raises(UserError) as refusal:
        taking_turns_by(**changes)
    assert str(refusal.value) == message


def test_a_phase_without_an_update(capfd, here: Path) -> None:
    key = "stages.distil.family.phases.critic.updates"
    done = run_here(capfd, *TINY, "experiment=dmd2", f"{key}=0")
    assert (done.code, done.err) == (2, f"error: {key}=0: expected 1 or more\n")
