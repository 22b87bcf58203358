"""The weights that are handed on are those of the best validation, after a kill as well."""

from functools import partial
from typing import Any

import pytest
import torch
from encoder_fits import EncoderWorld, Recorder
from encoders import make
from safetensors.torch import load_file

from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.families.best_weights import learnt_tensors
from stillhouse.families.progressive.finetune import finetune
from stillhouse.students.encoders import pretrained_encoder, read_encoder

FEW = {"max_steps": 3, "val_check_interval": 3}
CHECKPOINTS = {
    "_target_": "stillhouse.families.checkpoints.ResumeCheckpoint",
    "checkpoint_every_n_steps": 2,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> EncoderWorld:
    return EncoderWorld.make(tmp_path_factory.mktemp("encoders"))


def best(watched: str = "val_loss", greater: bool = False, patience: int | None = None) -> dict:
    return {
        "_target_": "stillhouse.families.best_weights.BestWeights",
        "watched": watched,
        "greater_is_better": greater,
        "patience": patience,
    }


def recorded(seen: list[Any], monkeypatch: pytest.MonkeyPatch) -> dict:
    """Return the node of a recorder of what the test looks at; a node itself holds plain values."""
    monkeypatch.setattr("encoder_fits.Recorder", partial(Recorder, seen=seen))
    return {"_target_": "encoder_fits.Recorder"}


def exported(context: Any) -> dict[str, torch.Tensor]:
    return load_file(context.output / "model.safetensors")


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(("watched", "greater"), [("val_loss", False), ("val_accuracy", True)])
def test_the_best_validation_s_student_is_handed_on(
    world, stage_context, monkeypatch, watched, greater
) -> None:
    seen: list[Any] = []
    callbacks = {"seen": recorded(seen, monkeypatch), "best": best(watched, greater)}
    context = stage_context("fit")
    metrics = world.fit(own_callbacks=callbacks)(context).metrics
    values = [found[watched] for _, found, _ in seen]
    place = values.index(max(values) if greater else min(values))
    assert len(values) == 16
    assert 0 < place < 15, "neither the first nor the last is the best, so that the rule shows"
    step, found, weights = seen[place]
    assert same(exported(context), weights)
    assert not same(exported(context), seen[-1][2])
    assert metrics["steps"] == 80
    assert metrics["best_step"] == step
    assert {name: metrics[name] for name in found} == found, "of the student that is handed on"
    assert context.console.file.getvalue().endswith(
        f"fit: the weights of step {step} are handed on, {watched} {values[place]:.4g}\n"
    )


def test_it_stops_when_patience_is_at_its_end(world, stage_context, monkeypatch) -> None:
    whole: list[Any] = []
    world.fit(own_callbacks={"seen": recorded(whole, monkeypatch)})(stage_context("whole"))
    values = [found["val_loss"] for _, found, _ in whole]
    # The first value that three higher ones follow, whatever may come then.
    place = next(
        i for i, v in enumerate(values) if min(values[i + 1 : i + 4]) > v == min(values[: i + 1])
    )
    assert place + 3 < values.index(min(values)), "a better one would have come"

    seen: list[Any] = []
    context = stage_context("stopped")
    callbacks = {"seen": recorded(seen, monkeypatch), "best": best(patience=3)}
    metrics = world.fit(own_callbacks=callbacks)(context).metrics
    assert [found["val_loss"] for _, found, _ in seen] == values[: place + 4]
    assert metrics["steps"] == whole[place + 3][0]
    assert metrics["val_loss"] == values[place]
    assert same(exported(context), whole[place][2])
    said = " ".join(context.console.file.getvalue().split())
    assert said.endswith("; stopped after 3 validations without a gain")


@pytest.mark.parametrize(
    ("step", "patience", "best_step"),
    [pytest.param(17, 4, 5, id="while it waits"), pytest.param(62, None, 50, id="behind the best")],
)
def test_killed_and_gone_on_with_equals_uninterrupted(
    world, stage_context, step, patience, best_step
) -> None:
    own = {"best": best(patience=patience)}
    settings: dict[str, Any] = {"callbacks": {"checkpoint": CHECKPOINTS}}
    whole = stage_context("whole")
    expected = world.fit(**settings, own_callbacks=own)(whole)
    assert best_step == expected.metrics["best_step"] < step < expected.metrics["steps"]

    stop = {"_target_": "encoder_fits.Stop", "step": step}
    with pytest.raises(RuntimeError, match="killed"):
        world.fit(**settings, own_callbacks=own | {"stop": stop})(stage_context("broken"))
    broken = stage_context("broken")
    assert list(broken.scratch.glob("checkpoints/step=*.ckpt"))
    found = world.fit(**settings, own_callbacks=own)(broken)
    assert found.metrics == expected.metrics
    assert same(exported(broken), exported(whole))


@pytest.mark.slow
def test_two_ranks_stop_together_and_hand_on_what_was_measured(world, stage_context) -> None:
    context = stage_context("fit")
    trainer = {"devices": 2, "strategy": "ddp", "val_check_interval": 4}
    metrics = world.fit(trainer=trainer, own_callbacks={"best": best(patience=3)})(context).metrics
    assert metrics["best_step"] == metrics["steps"] - 12 > 0, "stopped by patience"
    data = world.made()
    student = pretrained_encoder(data, path=str(context.output)).eval()
    total = torch.zeros(())
    for batch in data.evaluation_batches("validation"):
        loss = finetune(read_encoder(student, batch), None, batch).total.detach()
        total += loss * len(batch.input_ids)
    assert metrics["val_loss"] == pytest.approx(total.item() / 32, rel=1e-5)


def test_nothing_is_kept_of_what_a_student_does_not_learn() -> None:
    student = make("bert")
    student.bert.embeddings.requires_grad_(False)
    student.register_buffer("mean", torch.zeros(2))
    learnt = learnt_tensors(student)
    assert "mean" in learnt
    assert "bert.encoder.layer.0.output.dense.weight" in learnt
    assert not [name for name in learnt if "embeddings" in name]


def test_one_that_is_left_out_changes_nothing(world, stage_context) -> None:
    with_none, without = stage_context("with"), stage_context("without")
    metrics = world.fit(own_callbacks={"best": None}, trainer=FEW)(with_none).metrics
    assert metrics == world.fit(trainer=FEW)(without).metrics
    assert "best_step" not in metrics
    assert same(exported(with_none), exported(without))


def test_bad_input(world, stage_context) -> None:
    def refusal(trainer: Any = None, **settings: Any) -> str:
        fit = world.fit(own_callbacks={"best": best(**settings)}, trainer=trainer or {})
        context = stage_context("fit")
        with pytest.raises(UserError) as refused:
            fit(context)
        return str(refused.value)

    assert refusal(watched="val_acuracy") == (
        "stages.fit.own_callbacks.best.watched=val_acuracy: the validation of this stage logs no "
        "such value; expected val_accuracy or val_loss or val_score; did you mean 'val_accuracy' "
        "or 'val_score'?"
    )
    assert refusal({"val_check_interval": 90}) == (
        "trainer.val_check_interval=90: the stage ends after 80 batches, before any validation "
        "could tell the best weights; expected 80 or less, or stages.fit.own_callbacks.best=null"
    )


def test_one_of_the_whole_recipe_is_named_where_it_stands(world, stage_context) -> None:
    fit = world.fit(callbacks={"kept": best("val_f1", True)}, trainer=FEW)
    with pytest.raises(UserError) as refused:
        fit(stage_context("fit"))
    assert str(refused.value).startswith("callbacks.kept.watched=val_f1: ")


def test_values_that_are_not_finite_are_no_gain(world, stage_context, monkeypatch) -> None:
    score = ("accuracy", float("nan"))
    monkeypatch.setattr("stillhouse.families.progressive.module.main_score", lambda *_: score)
    fit, context = (
        world.fit(own_callbacks={"best": best("val_accuracy", True)}),
        stage_context("fit"),
    )
    with pytest.raises(TrainingDiverged) as refused:
        fit(context)
    assert str(refused.value) == (
        "no validation found a finite val_accuracy, so no weights are the best; lower "
        "optimizer.learning_rate, or clip with trainer.gradient_clip_val"
    )
