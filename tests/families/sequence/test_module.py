from functools import partial

import pytest
import torch
import torch.nn.functional as F
from training import bare_trainer, plain_sgd

from stillhouse.data.encoding import text_as_tokens
from stillhouse.data.language import KeptBatches
from stillhouse.data.windows import TokenWindows, collate_windows
from stillhouse.errors import TrainingDiverged, UserError
from stillhouse.families.optimizers import adamw
from stillhouse.families.sequence.module import SequenceDistiller
from stillhouse.families.sequence.sft import sft
from stillhouse.families.sequence.word_kd import word_kd
from stillhouse.records.losses import LossTerms
from stillhouse.teachers.live import LiveTeacher

DOCUMENTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [3, 5], [8, 9, 7, 9], [3]]
WINDOWS = TokenWindows(
    [text_as_tokens(d, 0) for d in DOCUMENTS], length=16, end_token=0, packing=False
).in_order()
collate = partial(collate_windows, pad_token=0)
# Token counts of 10 and 10 would hide a wrong mean: 10 tokens against 3 + 5 + 2, padded, do not.
MICRO_BATCHES = [collate(WINDOWS[:1]), collate(WINDOWS[1:3]), collate(WINDOWS[3:])]


@pytest.fixture
def fit(tmp_path):
    def fit(distiller, batches, **options):
        trainer = bare_trainer(tmp_path, **options)
        distiller.train()
        trainer.fit(distiller, KeptBatches(batches), KeptBatches(MICRO_BATCHES))
        return trainer

    return fit


def parameters_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def flat(tensors):
    return torch.cat([t.flatten() for t in tensors])


def update_of(fit, model, batches, **options):
    """Return what one optimiser step takes away from the parameters, in one row."""
    before = parameters_of(model)
    fit(SequenceDistiller(model, None, sft, plain_sgd), batches, max_steps=1, **options)
    after = parameters_of(model)
    return flat(before[name] - after[name] for name in before)


def nll_of(model, window):
    logits = model(input_ids=window.input_ids.unsqueeze(0)).logits[0]
    return F.cross_entropy(logits, window.labels, reduction="none")


def gradient_of_token_mean(model):
    """The gradient of the mean over all tokens, without padding, batches or Lightning."""
    loss = torch.cat([nll_of(model, window) for window in WINDOWS]).mean()
    return flat(torch.autograd.grad(loss, list(model.parameters())))


def test_accumulated_gradient_is_that_of_the_mean_over_all_tokens(fit, tiny_llama):
    expected = gradient_of_token_mean(tiny_llama())
    whole = update_of(fit, tiny_llama(), [collate(WINDOWS)])
    accumulated = update_of(fit, tiny_llama(), MICRO_BATCHES, accumulate_grad_batches=3)
    torch.testing.assert_close(whole, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(accumulated, expected, rtol=1e-5, atol=1e-8)

    model = tiny_llama()
    means = torch.stack(
        [
            torch.cat([nll_of(model, window) for window in windows]).mean()
            for windows in (WINDOWS[:1], WINDOWS[1:3], WINDOWS[3:])
        ]
    )
    mean_of_means = flat(torch.autograd.grad(means.mean(), list(model.parameters())))
    assert (mean_of_means - expected).norm() > 0.1 * expected.norm(), "the counts are too equal"


def test_token_count_starts_anew_in_every_window_of_accumulation(fit, tiny_llama):
    model = tiny_llama()
    fit(
        SequenceDistiller(model, None, sft, plain_sgd),
        [MICRO_BATCHES[0], MICRO_BATCHES[1]] * 2,
        max_steps=2,
        accumulate_grad_batches=2,
    )
    in_two_runs = tiny_llama()
    for _ in range(2):
        update_of(fit, in_two_runs, MICRO_BATCHES[:2], accumulate_grad_batches=2)
    torch.testing.assert_close(parameters_of(model), parameters_of(in_two_runs))


def test_clipping_sees_the_gradient_of_the_token_mean(fit, tiny_llama):
    expected = gradient_of_token_mean(tiny_llama())
    # Above the norm of the token mean, far below that of the sum.
    loose, tight = 2 * expected.norm().item(), 0.5 * expected.norm().item()
    options = {"accumulate_grad_batches": 3}
    unclipped = update_of(fit, tiny_llama(), MICRO_BATCHES, gradient_clip_val=loose, **options)
    clipped = update_of(fit, tiny_llama(), MICRO_BATCHES, gradient_clip_val=tight, **options)
    torch.testing.assert_close(unclipped, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(clipped, expected / 2, rtol=1e-5, atol=1e-8)


def test_validation_loss_is_the_mean_over_all_tokens(fit, tiny_llama):
    model = tiny_llama()
    distiller = SequenceDistiller(model, None, sft, partial(adamw, learning_rate=1e-3))
    trainer = fit(distiller, MICRO_BATCHES, max_steps=1, val_check_interval=1)
    expected = torch.cat([nll_of(model, window) for window in WINDOWS]).mean().item()
    assert trainer.callback_metrics["val_nll"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shares_a_parameter", [False, True])
def test_teacher_is_neither_trained_nor_kept(fit, tiny_llama, tmp_path, shares_a_parameter):
    student, teacher = tiny_llama(1), LiveTeacher(tiny_llama(2, attention_dropout=0.5))
    if shares_a_parameter:
        student.model.embed_tokens = teacher.model.model.embed_tokens
    taught, untaught = parameters_of(teacher), parameters_of(student)
    method = partial(word_kd, cross_entropy_weight=0.5)
    optimised_modules = []

    def optimizer(module, max_steps):
        optimised_modules.append(module)
        return adamw(module, max_steps, learning_rate=0.01)

    distiller = SequenceDistiller(student, teacher, method, optimizer)
    trainer = fit(distiller, MICRO_BATCHES, max_steps=3)
    assert optimised_modules == [student]
    trainer.save_checkpoint(tmp_path / "kept.ckpt")

    torch.testing.assert_close(parameters_of(teacher), taught, rtol=0, atol=0)
    assert not any(module.training for module in teacher.modules())
    own = {
        name: p
        for name, p in student.named_parameters()
        if not (shares_a_parameter and name == "model.embed_tokens.weight")
    }
    assert all(not torch.equal(p, untaught[name]) for name, p in own.items())

    optimised = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert optimised == {id(p) for p in own.values()}
    kept = torch.load(tmp_path / "kept.ckpt", weights_only=True)["state_dict"]
    assert set(kept) == {f"student.{name}" for name in own}
    for name, p in own.items():
        assert torch.equal(kept[f"student.{name}"], p)


def test_teacher_speaks_without_dropout_while_the_student_trains(tiny_llama):
    student, model = tiny_llama(1, attention_dropout=0.5), tiny_llama(2, attention_dropout=0.5)
    distiller = SequenceDistiller(student, LiveTeacher(model), word_kd, plain_sgd).train()
    assert student.training
    batch = collate(WINDOWS[:1])
    expected = model(input_ids=batch.input_ids).logits
    signal = distiller.teacher(batch)
    torch.testing.assert_close(signal.logits, expected)
    assert not signal.logits.requires_grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_loss_that_is_not_finite_stops_training_before_it_reaches_the_student(
    fit, tiny_llama, value
):
    calls = []

    def breaks_in_the_fourth_batch(student, signal, batch):
        calls.append(batch)
        losses = sft(student, signal, batch)
        return losses if len(calls) < 4 else LossTerms(total=losses.total * value)

    model = tiny_llama()
    distiller = SequenceDistiller(model, None, breaks_in_the_fourth_batch, plain_sgd)
    with pytest.raises(TrainingDiverged, match=rf"{value} at step 1, batch 3\b"):
        fit(distiller, MICRO_BATCHES * 2, max_steps=3, accumulate_grad_batches=2)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_parameter_that_is_not_finite_is_never_saved(fit, tiny_llama, tmp_path, value):
    model = tiny_llama()
    trainer = fit(SequenceDistiller(model, None, sft, plain_sgd), MICRO_BATCHES, max_steps=1)
    model.model.norm.weight.data[3] = value
    with pytest.raises(TrainingDiverged, match=r"model\.norm\.weight .* step 1"):
        trainer.save_checkpoint(tmp_path / "broken.ckpt")
    assert not (tmp_path / "broken.ckpt").exists()


@pytest.mark.parametrize("method", [sft, partial(word_kd, divergence="jsd", temperature=2.0)])
def test_a_step_without_logits_is_the_step_with_them(fit, tiny_llama, method) -> None:
    """Two optimiser steps over unequal micro-batches, and the validation after them."""
    after = []
    for backend in (None, "reference", "streaming"):
        teacher = None if method is sft else LiveTeacher(tiny_llama(1))
        model = tiny_llama()
        distiller = SequenceDistiller(model, teacher, method, plain_sgd, loss_backend=backend)
        trainer = fit(distiller, MICRO_BATCHES * 2, max_steps=2, accumulate_grad_batches=3)
        metrics = trainer.callback_metrics
        after.append((flat(parameters_of(model).values()), metrics["val_nll"]))
    for parameters, val_nll in after[1:]:
        torch.testing.assert_close(parameters, after[0][0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(val_nll, after[0][1], rtol=1e-6, atol=0)


def test_chosen_layers_are_kept_in_training_alone(fit, tiny_llama) -> None:
    seen, kept = [], SequenceDistiller._student_output

    class Watched(SequenceDistiller):
        def _student_output(self, *args):
            output = kept(self, *args)
            seen.append((self.trainer.validating, list(output.layers)))
            return output

    distiller = Watched(tiny_llama(), None, sft, plain_sgd, layers=[2, 0])
    fit(distiller, MICRO_BATCHES[:1], max_steps=1, val_check_interval=1)
    assert seen == [(False, [2, 0]), *[(True, [])] * 3]


@pytest.mark.parametrize("layers", [[1, 3], [-1]])
def test_layer_that_the_student_has_not_is_refused(tiny_llama, layers) -> None:
    with pytest.raises(UserError) as refusal:
        SequenceDistiller(tiny_llama(), None, sft, plain_sgd, layers=layers)
    assert str(refusal.value) == (
        f"stages.<stage>.family.layers={layers}: the student has the layers 0 to 2"
    )
