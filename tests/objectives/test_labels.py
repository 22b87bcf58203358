"""Losses of logits against torch's own, in closed form, for the three kinds of labels."""

import pytest
import torch
import torch.nn.functional as F
from encoder_outputs import draw
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.labels import hard_label_loss, soft_cross_entropy, soft_label_loss
from stillhouse.records.encoders import EncoderBatch, EncoderOutput

# The second text is padding alone.
MASK = torch.tensor([[True, True], [False, False], [True, False]])
TEXTS = [0, 2]
LOGITS, TEACHER = 2 * draw(3, 4, seed=0), 2 * draw(3, 4, seed=1)
CLASSES = torch.tensor([2, 1, 0])
TARGETS = torch.tensor([0.5, -2.0, 1.5], dtype=torch.float64)
SEVERAL = torch.tensor([[1, 0, 0, 1], [1, 1, 1, 1], [0, 0, 1, 0]], dtype=torch.float64)
KINDS = {"classification": CLASSES, "regression": TARGETS, "multi_label": SEVERAL}
every_kind = pytest.mark.parametrize("kind", KINDS)


def batch_of(labels: Tensor | None) -> EncoderBatch:
    return EncoderBatch(torch.zeros_like(MASK, dtype=torch.long), MASK, labels=labels)


def says(logits: Tensor, kind: str = "classification") -> EncoderOutput:
    return EncoderOutput(logits=logits[:, :1] if kind == "regression" else logits)


def hard_by_hand(z: Tensor, kind: str) -> Tensor:
    z, labels = z[TEXTS], KINDS[kind][TEXTS]
    if kind == "classification":
        return F.cross_entropy(z, labels)
    if kind == "regression":
        return F.mse_loss(z[:, 0], labels)
    return F.binary_cross_entropy_with_logits(z, labels)


def soft_by_hand(z: Tensor, kind: str, temperature: float) -> Tensor:
    z, t = z[TEXTS], TEACHER[TEXTS]
    if kind == "regression":
        return F.mse_loss(z[:, 0], t[:, 0])
    z, t = z / temperature, t / temperature
    if kind == "classification":
        return temperature**2 * F.cross_entropy(z, t.softmax(-1))
    return temperature**2 * F.binary_cross_entropy_with_logits(z, t.sigmoid())


@every_kind
def test_hard_labels_are_torch_s_own_losses_over_the_texts(kind: str) -> None:
    z = LOGITS.clone().requires_grad_()
    found, expected = hard_label_loss(says(z, kind), batch_of(KINDS[kind])), hard_by_hand(z, kind)
    assert expected > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_soft_labels_are_torch_s_own_losses_over_the_texts(kind: str, temperature: float) -> None:
    z, t = LOGITS.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    found = soft_label_loss(
        says(z, kind), says(t, kind), batch_of(KINDS[kind]), temperature=temperature
    )
    expected = soft_by_hand(z, kind, temperature)
    assert expected > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradient, of_teacher = torch.autograd.grad(found, (z, t), allow_unused=True, retain_graph=True)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, z)[0])
    assert of_teacher is None


def test_gradient_of_soft_labels_is_the_difference_of_the_distributions() -> None:
    z = LOGITS.clone().requires_grad_()
    soft_cross_entropy(z, TEACHER).sum().backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, (LOGITS.softmax(-1) - TEACHER.softmax(-1)))


def test_a_teacher_that_is_certain_of_the_label_is_the_label() -> None:
    z = LOGITS.clone().requires_grad_()
    certain = 1e3 * F.one_hot(CLASSES, 4).double()
    batch = batch_of(CLASSES)
    soft = soft_label_loss(says(z), says(certain), batch, temperature=1.0)
    hard = hard_label_loss(says(z), batch)
    torch.testing.assert_close(soft, hard)
    torch.testing.assert_close(torch.autograd.grad(soft, z), torch.autograd.grad(hard, z))


def losses_of(z: Tensor, t: Tensor, labels: Tensor, kind: str) -> list[Tensor]:
    student, teacher, batch = says(z, kind), says(t, kind), batch_of(labels)
    return [
        hard_label_loss(student, batch),
        soft_label_loss(student, teacher, batch, temperature=3.0),
    ]


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_is_computed_in_float32(
    kind: str, dtype: torch.dtype, autocast: bool
) -> None:
    labels = KINDS[kind]
    half = labels.to(dtype) if labels.is_floating_point() else labels
    z, t = LOGITS.to(dtype), TEACHER.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = losses_of(z, t, half, kind)
    exact = losses_of(z.double(), t.double(), labels, kind)
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)


def test_no_text_at_all_costs_nothing() -> None:
    z = LOGITS.clone().requires_grad_()
    empty = batch_of(CLASSES)._replace(attention_mask=torch.zeros_like(MASK))
    for loss in (
        hard_label_loss(says(z), empty),
        soft_label_loss(says(z), says(TEACHER), empty, temperature=1.0),
    ):
        assert loss == 0
        assert not torch.autograd.grad(loss, z)[0].any()


def test_texts_without_labels_are_refused() -> None:
    said = says(LOGITS)
    expected = (
        "data: its texts have no labels, which this method needs; expected a labelled set such as "
        "data=sentiment, or a method without labels such as method=ernie_tiny_latent"
    )
    with pytest.raises(UserError) as hard:
        hard_label_loss(said, batch_of(None))
    with pytest.raises(UserError) as soft:
        soft_label_loss(said, said, batch_of(None), temperature=1.0)
    assert str(hard.value) == str(soft.value) == expected


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_an_encoder_without_a_head_is_refused(whose: str) -> None:
    said = {"student": says(LOGITS), "teacher": says(TEACHER), whose: EncoderOutput()}
    with pytest.raises(UserError) as refused:
        soft_label_loss(said["student"], said["teacher"], batch_of(CLASSES), temperature=1.0)
    assert str(refused.value) == (
        f"{whose}: it has no head for the task; expected an encoder of a labelled set of data, "
        "fine-tuned where it is the teacher"
    )


def test_a_teacher_of_another_task_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        soft_label_loss(says(LOGITS), says(TEACHER[:, :3]), batch_of(CLASSES), temperature=1.0)
    assert str(refused.value) == (
        "teacher.path: its head has 3 outputs, the student's 4; expected a teacher that was "
        "fine-tuned on this task"
    )
