"""The step of the family against the mean over texts, each alone and without padding."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoders import CLASSES, LAYERS, WIDTH, make, make_batch, make_tokenizer
from torch import Tensor
from training import bare_trainer, plain_sgd
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig

from stillhouse.data.encoders import EncoderData
from stillhouse.data.labelled.task import Task
from stillhouse.data.language import KeptBatches
from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.evaluation.classification import scores
from stillhouse.families.optimizers import adamw
from stillhouse.families.progressive.ernie_tiny import ernie_tiny, latent, relation, tinybert
from stillhouse.families.progressive.finetune import finetune
from stillhouse.families.progressive.module import ProgressiveDistiller
from stillhouse.records.encoders import EncoderBatch, EncoderOutput
from stillhouse.records.losses import LossTerms
from stillhouse.students.encoders import read_encoder
from stillhouse.students.layer_maps import given, uniform
from stillhouse.teachers.encoders import LiveEncoder

LABELS = torch.tensor([0, 1, 1, 0])
BATCH = make_batch((7, 4, 9, 3), labels=LABELS)
TYPES: Any = BATCH.token_type_ids
LATENT = partial(relation, relation_heads=4)
METHOD = partial(ernie_tiny, latent_loss=LATENT, temperature=2.0)
MAP = partial(given, layers=[[0, 0], [2, 3], [3, 1]])


def part(rows: slice, width: int | None = None) -> EncoderBatch:
    """Return texts of `BATCH` as a batch of their own, at most `width` positions wide."""
    ids, mask, types = (x[rows, :width] for x in (BATCH.input_ids, BATCH.attention_mask, TYPES))
    return EncoderBatch(ids, mask, types, LABELS[rows])


# Three texts, and then one beside a row of padding: none of the means of these is the whole's.
LAST = part(slice(2, 4))
PADDED = LAST._replace(attention_mask=LAST.attention_mask & torch.tensor([[False], [True]]))
MICRO_BATCHES = [part(slice(0, 3)), PADDED]


@pytest.fixture
def fit(tmp_path) -> Callable[..., Any]:
    def fit(distiller: ProgressiveDistiller, batches: Any, validate: Any = (BATCH,), **options):
        trainer = bare_trainer(tmp_path, **({"max_steps": 1} | options))
        trainer.fit(distiller, KeptBatches(batches), KeptBatches(validate))
        return trainer

    return fit


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def update_of(fit, distiller: ProgressiveDistiller, batches, **options) -> Tensor:
    """Return what one optimiser step takes away from the student, in one row."""
    before = copies(distiller.student)
    fit(distiller, batches, **options)
    after = copies(distiller.student)
    return torch.cat([(before[name] - after[name]).flatten() for name in before])


def text_by_text(student: Any, teacher: Any, method: Any = METHOD) -> list[LossTerms]:
    """Return the losses of each text, alone and without padding, by the map's own layers."""
    found = []
    for row, length in enumerate(BATCH.attention_mask.sum(-1).tolist()):
        batch = part(slice(row, row + 1), length)
        ours = read_encoder(student, batch, hidden_layers=[0, 2, 3], attention_layers=[2, 3])
        said = read_encoder(teacher, batch, hidden_layers=[0, 1, 3], attention_layers=[1, 3])
        states, taps = said.hidden_states, said.attention
        signal = EncoderOutput(
            {0: states[0], 2: states[3], 3: states[1]}, {2: taps[3], 3: taps[1]}, said.logits
        )
        found.append(method(ours, signal, batch))
    return found


def distiller_of(student: Any, teacher: Any, method: Any = METHOD) -> ProgressiveDistiller:
    return ProgressiveDistiller(student, LiveEncoder(teacher), method, plain_sgd, layer_map=MAP)


def logits_of(student: Any) -> Any:
    return read_encoder(student, BATCH).logits


def test_accumulated_gradient_is_that_of_the_mean_over_all_texts(fit) -> None:
    student, teacher = make("bert", seed=1), make("bert", seed=2)
    losses = text_by_text(student, teacher)

    def gradient(loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, list(student.parameters()), retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    totals = torch.stack([loss.total for loss in losses])
    expected = gradient(totals.mean())
    mean_of_means = gradient((totals[:3].mean() + totals[3]) / 2)
    assert (mean_of_means - expected).norm() > 0.1 * expected.norm(), "the counts are too equal"
    whole = update_of(fit, distiller_of(make("bert", seed=1), teacher), [BATCH])
    torch.testing.assert_close(whole, expected, rtol=1e-6, atol=1e-9)
    distiller = distiller_of(make("bert", seed=1), teacher)
    in_parts = update_of(fit, distiller, MICRO_BATCHES, accumulate_grad_batches=2)
    torch.testing.assert_close(in_parts, expected, rtol=1e-6, atol=1e-9)
    metrics = distiller.trainer.callback_metrics
    assert distiller.summary()["texts_seen"] == 4
    assert metrics["train_loss"].item() == pytest.approx(totals.mean().item(), rel=1e-6)
    for name in ("attention_kl", "hidden_relation_kl", "soft_labels", "hard_labels"):
        mean = torch.stack([loss.terms[name] for loss in losses]).mean().item()
        assert metrics[f"train_{name}"].item() == pytest.approx(mean, rel=1e-6)


def test_count_starts_anew_in_every_window_of_accumulation(fit) -> None:
    options = {"accumulate_grad_batches": 2}
    once = distiller_of(make("bert", seed=1), make("bert", seed=2))
    fit(once, MICRO_BATCHES * 2, max_steps=2, **options)
    twice = make("bert", seed=1)
    fit(distiller_of(twice, make("bert", seed=2)), MICRO_BATCHES, **options)
    again = distiller_of(twice, make("bert", seed=2))
    fit(again, MICRO_BATCHES, **options)
    torch.testing.assert_close(copies(once.student), copies(twice))
    losses = [module.trainer.callback_metrics["train_loss"] for module in (once, again)]
    torch.testing.assert_close(*losses)


def test_validation_is_the_mean_over_all_texts_and_the_main_score(fit) -> None:
    student, teacher = make("bert", seed=1), make("bert", seed=2)
    distiller = distiller_of(student, teacher)
    trainer = fit(distiller, [BATCH], MICRO_BATCHES, val_check_interval=1)
    # After the step, which is validated.
    with torch.no_grad():
        losses = text_by_text(student, teacher)
        said = logits_of(student).argmax(-1)
    metrics = trainer.callback_metrics
    mean = torch.stack([loss.total for loss in losses]).mean().item()
    assert metrics["val_loss"].item() == pytest.approx(mean, rel=1e-6)
    right = (said == LABELS).double().mean().item()
    assert metrics["val_accuracy"].item() == pytest.approx(right)
    assert metrics["val_score"] == metrics["val_accuracy"]


@pytest.mark.parametrize(
    ("task", "labels", "name"),
    [
        (Task("regression", ("score",)), torch.tensor([0.5, -1.0, 2.0, 0.0]), "pearson"),
        (
            Task("multi_label", ("a", "b")),
            torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]]),
            "f1",
        ),
    ],
)
def test_a_task_of_any_kind_has_a_score(fit, task: Task, labels: Tensor, name: str) -> None:
    student = make("bert", task, seed=1)
    batch = BATCH._replace(labels=labels)
    distiller = ProgressiveDistiller(student, None, finetune, plain_sgd)
    found = fit(distiller, [batch], [batch], val_check_interval=1).callback_metrics
    with torch.no_grad():
        expected = scores(logits_of(student), labels)[name]
    assert {n for n in found if n.startswith("val_")} == {"val_loss", "val_score", f"val_{name}"}
    assert found["val_score"].item() == found[f"val_{name}"].item() == pytest.approx(expected)


def test_text_without_labels_has_no_score(fit) -> None:
    student, teacher = make("bert", None, seed=1), make("bert", None, seed=2)
    distiller = distiller_of(student, teacher, partial(latent, latent_loss=LATENT))
    unlabelled = BATCH._replace(labels=None)
    trainer = fit(distiller, [unlabelled], [unlabelled], val_check_interval=1)
    assert {n for n in trainer.callback_metrics if n.startswith("val_")} == {"val_loss"}


def test_a_fine_tuned_teacher_of_equal_weights_gives_the_same_step_bit_for_bit(fit) -> None:
    """General-enhanced distillation is general distillation where F = P."""
    method = partial(latent, latent_loss=LATENT)
    with_head = make("bert", CLASSES, seed=2)
    student = partial(make, "bert", None, seed=1)
    updates, losses = [], []
    for teacher in (with_head.bert, with_head):
        distiller = distiller_of(student(), teacher, method)
        updates.append(update_of(fit, distiller, [BATCH]))
        losses.append(distiller.trainer.callback_metrics["train_loss"])
    assert updates[0].norm() > 0.1
    assert torch.equal(*updates)
    assert torch.equal(*losses)


def test_fine_tuning_needs_neither_teacher_nor_layers(fit) -> None:
    student = make("bert", seed=1)
    loss = F.cross_entropy(logits_of(student), LABELS)
    expected = torch.autograd.grad(loss, list(student.parameters()))
    distiller = ProgressiveDistiller(student, None, finetune, plain_sgd)
    update = update_of(fit, distiller, MICRO_BATCHES, accumulate_grad_batches=2)
    torch.testing.assert_close(update, torch.cat([g.flatten() for g in expected]))


def test_teacher_is_neither_trained_nor_kept(fit, tmp_path) -> None:
    student, teacher = make("bert", seed=1), make("bert", seed=2)
    taught = copies(teacher)
    trainer = fit(distiller := distiller_of(student, teacher).train(), [BATCH])
    torch.testing.assert_close(copies(teacher), taught, rtol=0, atol=0)
    assert distiller.student.training
    assert not teacher.training
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)["state_dict"]
    assert {name.partition(".")[0] for name in kept} == {"student"}


def narrow(seed: int) -> Any:
    """Return a student of half the teacher's width, with heads and layers like it."""
    config = BertConfig.from_dict(make("bert").config.to_dict() | {"hidden_size": WIDTH // 2})
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_config(config).double().eval()


def projected(student: Any, teacher: Any, optimizer: Any = plain_sgd) -> ProgressiveDistiller:
    method = partial(latent, latent_loss=tinybert)
    made = ProgressiveDistiller(
        student,
        LiveEncoder(teacher),
        method,
        optimizer,
        layer_map=partial(uniform, embeddings=True),
        projection=True,
    )
    made.projections.double()
    return made


def test_projections_learn_with_the_student_and_are_left_behind(fit, tmp_path) -> None:
    student = narrow(1)
    distiller = projected(student, make("bert", seed=2), partial(adamw, learning_rate=1e-2))
    before = copies(distiller.projections)
    assert {name: p.shape for name, p in before.items()} == {
        f"{layer}.weight": (WIDTH, WIDTH // 2) for layer in range(LAYERS + 1)
    }
    trainer = fit(distiller, [BATCH])
    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    learning = [*student.parameters(), *distiller.projections.parameters()]
    assert optimised == {id(p) for p in learning}
    assert all(not torch.equal(p, before[n]) for n, p in copies(distiller.projections).items())
    trainer.save_checkpoint(tmp_path / "kept.ckpt")
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)["state_dict"]
    own = {n for n in kept if n.startswith("projections.")}
    assert own == {f"projections.{name}" for name in before}
    assert len(kept) == len(own) + len(list(student.named_parameters()))

    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    distiller.export(
        tmp_path / "out",
        EncoderData(
            0,
            corpus={},
            tokenizer_path=str(tmp_path / "tokenizer"),
            sequence_length=16,
            batch_size=2,
            evaluation_batch_size=2,
        ),
    )
    again: Any = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert set(again.state_dict()) == set(student.state_dict())
    torch.testing.assert_close(logits_of(again.double().eval()), logits_of(student))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == again.config.vocab_size


def test_projections_begin_as_the_identity_so_that_a_copy_has_nothing_to_learn(fit) -> None:
    distiller = projected(make("bert", seed=2), make("bert", seed=2))
    update = update_of(fit, distiller, [BATCH])
    assert distiller.trainer.callback_metrics["train_loss"] == 0
    assert not update.any()


def test_hidden_states_are_compared_as_they_are_projected(fit) -> None:
    student, teacher = narrow(1), make("bert", seed=2)
    distiller = projected(student, teacher)
    weights: Any = [projection.weight for projection in distiller.projections.values()]
    with torch.no_grad():
        ours = read_encoder(student, BATCH, hidden_layers=range(LAYERS + 1)).hidden_states
        theirs = read_encoder(teacher, BATCH, hidden_layers=range(LAYERS + 1)).hidden_states
        for W in weights:
            W.normal_()
        errors = [(ours[n] @ weights[n].T - theirs[n]).square().mean(-1) for n in ours]
    fit(distiller, [BATCH])
    by_text = [(e * BATCH.attention_mask).sum(-1) / BATCH.attention_mask.sum(-1) for e in errors]
    expected = torch.stack(by_text).sum(0).mean().item()
    found = distiller.trainer.callback_metrics["train_hidden_mse"].item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_loss_that_is_not_finite_stops_training_before_it_reaches_the_student(fit) -> None:
    def broken(student: EncoderOutput, signal: EncoderOutput, batch: EncoderBatch) -> LossTerms:
        return LossTerms(METHOD(student, signal, batch).total * torch.nan)

    student = make("bert", seed=1)
    with pytest.raises(TrainingDiverged, match="nan at step 0, batch 0"):
        fit(distiller_of(student, make("bert", seed=2), broken), [BATCH])
    assert all(p.isfinite().all() for p in student.parameters())


def refusal(teacher: Any, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        ProgressiveDistiller(make("bert"), teacher, METHOD, plain_sgd, **options)
    return str(refused.value)


def test_bad_input() -> None:
    teacher = LiveEncoder(make("bert", seed=2))
    assert refusal(None, layer_map=uniform) == (
        "stages.<stage>.family.layer_map: there is no teacher whose layers it could name; expected "
        "null, or a teacher"
    )
    for lacks in ({"teacher": None}, {"teacher": teacher}):
        assert refusal(**lacks, projection=True) == (
            "stages.<stage>.family.projection=true: no hidden states are compared; expected false, "
            "or a teacher and stages.<stage>.family.layer_map"
        )
    assert refusal(teacher, layer_map=partial(given, layers=[[1, 4]])) == (
        "stages.<stage>.family.layer_map.layers=[[1, 4]]: the teacher has the layers 0 to 3, not 4"
    )
