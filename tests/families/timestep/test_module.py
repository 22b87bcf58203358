"""The training step of the family: its draws, its windows, what is validated, kept and exported."""

import json
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from commands import TINY, only_run, run_here
from diffusers import DiffusionPipeline
from generators import POINTS, data_of, point_generator, ring_mixture
from torch import Generator, Tensor
from training import bare_trainer, plain_sgd

from stillhouse.data.images import ImageData
from stillhouse.data.stream import generator_for
from stillhouse.diffusion.solvers import ddim, few_step, uniform_grid
from stillhouse.errors import UserError
from stillhouse.evaluation.distances import sliced_wasserstein
from stillhouse.families.ema import MovingAverage
from stillhouse.families.optimizers import adamw
from stillhouse.families.timestep.module import TimestepDistiller
from stillhouse.families.timestep.networks import Networks, Phase
from stillhouse.records.diffusion import ImageBatch
from stillhouse.records.losses import LossTerms

TIMES = {"2": [1.5708, 1.1], "1": [1.5708]}


def still(networks: Networks, batch: ImageBatch, phase: Phase, generator: Generator) -> LossTerms:
    """A loss without randomness, weighted by what is learnt beside the student."""
    t = torch.linspace(0.3, 1.3, len(batch.x_0), dtype=torch.double).mean().repeat(len(batch.x_0))
    losses = (networks.student(batch.x_0, t, batch.condition) - 1).square().flatten(1).mean(1)
    if networks.log_variance is not None:
        u = networks.log_variance(t)
        losses = losses * torch.exp(-u) + u
    return LossTerms(total=losses.mean(), terms={"size": batch.x_0.abs().mean()})


def module_of(method: Any = still, optimizer: Any = plain_sgd, **options: Any) -> TimestepDistiller:
    settings = {"times": TIMES, "guidance_scale": 1.0, "takes_tangents": False}
    settings |= {"learnt_weighting": False} | options
    teacher = settings.pop("teacher", None)
    return TimestepDistiller(point_generator(), teacher, method, optimizer, **settings)


def fitted(
    module: TimestepDistiller, folder: Path, data: ImageData | None = None, **options: Any
) -> pl.Trainer:
    """Train it on points."""
    trainer = bare_trainer(folder, **({"max_steps": 2, "limit_val_batches": 0} | options))
    trainer.fit(module, datamodule=data or data_of(POINTS))
    return trainer


def drawn_in_training(folder: Path, seed: int = 0, **options: Any) -> list[Tensor]:
    seen: list[Tensor] = []

    def method(networks: Networks, batch: ImageBatch, phase: Phase, generator: Generator) -> Any:
        seen.append(torch.randn(3, generator=generator))
        # Another's draws from the global generator, a dropout's say, change nothing.
        torch.rand(len(seen))
        return still(networks, batch, phase, generator)

    data = data_of(POINTS)
    data.seed = seed
    fitted(module_of(method), folder, data, **options)
    return seen


def test_draws_are_decided_by_seed_and_place(tmp_path) -> None:
    torch.manual_seed(0)
    first = drawn_in_training(tmp_path)
    torch.manual_seed(1)
    again = drawn_in_training(tmp_path)
    assert len(first) == 2
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], drawn_in_training(tmp_path, seed=1)[0])
    # Micro-batches of a window draw other numbers.
    window = drawn_in_training(tmp_path, max_steps=1, accumulate_grad_batches=2)
    assert torch.equal(window[1], first[1])


def test_a_method_is_told_where_training_stands(tmp_path) -> None:
    seen: list[Phase] = []

    def method(networks: Networks, batch: ImageBatch, phase: Phase, generator: Generator) -> Any:
        seen.append(phase)
        return still(networks, batch, phase, generator)

    fitted(module_of(method), tmp_path, max_steps=3, accumulate_grad_batches=2)
    assert seen == [Phase(update, 3, update) for update in (0, 0, 1, 1, 2, 2)]


def test_two_halves_are_a_whole_batch(tmp_path) -> None:
    """Gradients are of the mean over the window's samples, and so is what is logged."""
    whole, halves = module_of(), module_of()
    before = {n: p.detach().clone() for n, p in whole.student.named_parameters()}
    metrics = []
    for module, size, parts in ((whole, 8, 1), (halves, 4, 2)):
        data = data_of(POINTS, batch_size=size)
        trainer = fitted(module, tmp_path, data, max_steps=1, accumulate_grad_batches=parts)
        metrics.append({name: float(v) for name, v in trainer.callback_metrics.items()})
        assert module.units_seen == 8
    batch = data.collate([i for n in range(2) for _, i in data.train_dataloader().keys(n)])
    reference = module_of()
    total = still(reference.networks, batch, Phase(0, 1), Generator()).total
    total.backward()
    loss = total.item()
    for name, parameter in reference.student.named_parameters():
        assert parameter.grad is not None
        expected = before[name] - parameter.grad
        for module in (whole, halves):
            torch.testing.assert_close(module.student.get_parameter(name).data, expected)
    for found in metrics:
        assert found["train_loss"] == pytest.approx(loss)
        assert found["train_size"] == pytest.approx(float(batch.x_0.abs().mean()))


def test_learnt_weighting_is_trained_and_left_behind(tmp_path) -> None:
    module = module_of(learnt_weighting=True)
    assert module.log_variance is not None
    t = torch.linspace(0, 1.5, 7)
    assert (module.log_variance(t) == 0).all()
    fitted(module, tmp_path, max_steps=1)
    assert (module.log_variance(t) != 0).all()
    # d/du (L e^{-u} + u) = 1 - L at u = 0: a step of rate 1 of the bias.
    loss = module.summary()["train_loss"]
    assert module.log_variance.line.bias.item() == pytest.approx(loss - 1, abs=1e-6)
    module.export(tmp_path / "student", data_of(POINTS))
    pipeline: Any = DiffusionPipeline.from_pretrained(tmp_path / "student", trust_remote_code=True)
    exported = pipeline.transformer.state_dict()
    assert not [name for name in exported if "variance" in name]
    ours: Any = module.student
    assert all(torch.equal(tensor, exported[n]) for n, tensor in ours.model.state_dict().items())
    assert exported.keys() == ours.model.state_dict().keys()


def test_a_weighting_that_is_not_read_is_refused(tmp_path) -> None:
    def unweighted(networks: Networks, *rest: Any) -> LossTerms:
        return still(replace(networks, log_variance=None), *rest)

    with pytest.raises(UserError) as caught:
        fitted(module_of(unweighted, learnt_weighting=True), tmp_path)
    assert str(caught.value) == (
        "stages.<stage>.family.learnt_weighting=true: this method does not weight its loss by what "
        "is learnt; expected false"
    )


def test_what_is_exported_keeps_times_and_scale(tmp_path) -> None:
    module_of(guidance_scale=2.5).export(tmp_path, data_of(POINTS))
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["times"] == TIMES
    assert index["guidance_scale"] == 2.5
    assert index["classes"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("teacher", [ring_mixture, partial(point_generator, seed=5)])
def test_no_checkpoint_holds_the_teacher(tmp_path, teacher) -> None:
    module = module_of(teacher=teacher().requires_grad_(False), learnt_weighting=True)
    trainer = fitted(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "step.ckpt")
    kept = torch.load(tmp_path / "step.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in kept if name.startswith("teacher")]
    assert {name for name in kept if name.startswith("student")}
    assert {"log_variance.line.weight", "log_variance.line.bias"} <= set(kept)
    names = [n for n, _ in module.named_parameters() if not n.startswith("teacher")]
    assert set(names) <= set(kept)


def distance(module: TimestepDistiller, data: ImageData) -> float:
    """Return val_sliced_wasserstein as its words have it, batch by batch."""
    parts, student = [], module.student
    for number, batch in enumerate(data.val_dataloader()):
        generator = generator_for(number)
        noise = torch.randn(batch.x_0.shape, generator=generator)

        def velocity(x: Tensor, t: Tensor, said=batch.condition) -> Tensor:
            return student(x, t, said, torch.full((len(x),), module.guidance_scale).double())

        with torch.no_grad():
            if module.times:
                parts.append(few_step(velocity, noise, TIMES["1"], generator))
            else:
                parts.append(ddim(velocity, noise, uniform_grid(20)))
    return sliced_wasserstein(torch.cat(parts), data.samples("validation").values)


@pytest.mark.parametrize("times", [TIMES, {}])
def test_validation_samples_in_the_fewest_steps_alike_every_time(tmp_path, times) -> None:
    """One step, whatever stands first; a flow is integrated."""
    module, data = module_of(times=times), data_of(POINTS)
    trainer = bare_trainer(tmp_path)
    found = [trainer.validate(module, datamodule=data, verbose=False)[0] for _ in range(2)]
    assert found[0] == found[1]
    assert found[0]["val_sliced_wasserstein"] == pytest.approx(distance(module, data), rel=1e-5)


class Seen(pl.Callback):
    """Notes every validation's value, and the weights that training has there."""

    def __init__(self) -> None:
        self.found: list[tuple[float, dict[str, Tensor]]] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = float(trainer.callback_metrics["val_sliced_wasserstein"])
        student: Any = pl_module.student
        self.found.append((value, {n: t.clone() for n, t in student.state_dict().items()}))


def test_validation_sees_the_average_and_training_does_not(tmp_path) -> None:
    optimizer = partial(adamw, learning_rate=0.05, warmup_fraction=0.0)
    average, seen, data = MovingAverage(decay=0.9), Seen(), data_of(POINTS)
    module, plain = module_of(optimizer=optimizer), module_of(optimizer=optimizer)
    options = {"max_steps": 6, "limit_val_batches": 1.0, "val_check_interval": 6}
    options |= {"check_val_every_n_epoch": None}
    fitted(module, tmp_path, **options, callbacks=[average, seen])
    fitted(plain, tmp_path, **options)
    ((value, trained),) = seen.found
    assert all(torch.equal(trained[n], t) for n, t in plain.student.state_dict().items())
    assert value == pytest.approx(distance(module, data), rel=1e-5), "the average is handed on"
    assert abs(value - distance(plain, data)) > 1e-3
    kept = average.state_dict()["average"]
    assert all(torch.equal(module.student.state_dict()[n], t) for n, t in kept.items())


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (
            "[1.1,1.5]",
            "[1.1, 1.5]: expected times that fall strictly from at most π/2 = 1.5708 and stay "
            "above 0, such as [1.5708, 1.1]",
        ),
        ("[1.5]", "[1.5]: expected 2 times, one of each step"),
    ],
)
def test_times_that_are_no_way_to_data(capfd, here: Path, times: str, message: str) -> None:
    key = "stages.distil.family.times.2"
    done = run_here(capfd, *TINY, "experiment=scm_points", f"{key}={times}")
    assert (done.code, done.err) == (2, f"error: {key}={message}\n")


def test_a_student_without_a_tangent_and_the_way_out(capfd, here: Path) -> None:
    """Refused before the first step; what the message says to do is enough."""
    command = (*TINY, "experiment=scm_points", "student._target_=generators.without_tangent")
    done = run_here(capfd, *command)
    assert done.code == 2
    said = re.fullmatch(
        r"error: student: its module network\.model\.embed \(Opaque\) has no forward-mode "
        r"derivative \(.+\); take the tangent of a difference instead, (\S+) with (\S+)\n",
        done.err,
    )
    assert said is not None, done.err
    folder = only_run(here / "outputs")
    assert "train_loss" not in "".join(p.read_text() for p in folder.rglob("metrics.csv"))
    mended = run_here(capfd, *command, *said.groups(), "paths.outputs=mended")
    assert mended.code == 0, mended.err
