"""ERNIE-Tiny's losses against sums worked out layer by layer and text by text, in float64."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from encoder_outputs import MASK, draw, kl, mean_over_texts, padded, padded_tap, scores, slices, tap
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.families.progressive.ernie_tiny import (
    ernie_tiny,
    latent,
    minilm,
    relation,
    tinybert,
)
from stillhouse.families.progressive.finetune import finetune
from stillhouse.records.encoders import AttentionTap, EncoderBatch, EncoderOutput

HEADS, SLICES = 2, 3
LABELS = torch.tensor([1, 3, 0])
SOFT: dict[str, Any] = {"latent_weight": 0.0, "hard_weight": 0.0}
HARD: dict[str, Any] = {"latent_weight": 0.0, "soft_weight": 0.0}
BATCH = EncoderBatch(torch.zeros_like(MASK, dtype=torch.long), MASK, labels=LABELS)
RELATION = partial(relation, relation_heads=SLICES)


def output(seed: int, width: int, heads: int = HEADS) -> EncoderOutput:
    return EncoderOutput(
        hidden_states={n: draw(*MASK.shape, width, seed=seed + n) for n in (0, 1, 2)},
        attention={n: tap(seed + 10 * n, heads=heads) for n in (1, 2)},
        logits=2 * draw(3, 4, seed=seed + 50),
    )


# The teacher is wider; of the TinyBERT form, which compares as it is projected, another one is not.
STUDENT, TEACHER, ALIKE = output(100, width=6), output(200, width=9), output(300, width=6)


def attention_by_hand(n: int, signal: EncoderOutput) -> Tensor:
    ours, theirs = STUDENT.attention[n], signal.attention[n]
    return mean_over_texts(
        lambda b, length: kl(*(cut_scores(t.queries, t.keys, b, length) for t in (theirs, ours)))
    )


def values_by_hand(n: int, signal: EncoderOutput) -> Tensor:
    ours, theirs = STUDENT.attention[n], signal.attention[n]
    return mean_over_texts(
        lambda b, length: kl(*(cut_scores(t.values, t.values, b, length) for t in (theirs, ours)))
    )


def squares_by_hand(n: int, signal: EncoderOutput) -> Tensor:
    ours, theirs = STUDENT.attention[n], signal.attention[n]

    def of_text(b: int, length: int) -> Tensor:
        U_S, U_T = (cut_scores(t.queries, t.keys, b, length) for t in (ours, theirs))
        return (U_S - U_T).square().mean()

    return mean_over_texts(of_text)


def cut_scores(left: Tensor, right: Tensor, text: int, length: int) -> Tensor:
    return scores(left[text, :, :length], right[text, :, :length])


def relations_by_hand(n: int, signal: EncoderOutput) -> Tensor:
    def of_text(b: int, length: int) -> Tensor:
        pair = (signal.hidden_states[n], STUDENT.hidden_states[n])
        of_slices = (slices(states[b, :length], SLICES) for states in pair)
        return kl(*(scores(X, X) for X in of_slices))

    return mean_over_texts(of_text)


def states_by_hand(n: int, signal: EncoderOutput) -> Tensor:
    error = STUDENT.hidden_states[n] - signal.hidden_states[n]
    return mean_over_texts(lambda b, length: error[b, :length].square().mean())


Form = tuple[Any, EncoderOutput, dict[str, list[Tensor]]]
FORMS: dict[str, Form] = {
    "relation": (
        RELATION,
        TEACHER,
        {
            "attention_kl": [attention_by_hand(n, TEACHER) for n in (1, 2)],
            "hidden_relation_kl": [relations_by_hand(n, TEACHER) for n in (0, 1, 2)],
        },
    ),
    "tinybert": (
        tinybert,
        ALIKE,
        {
            "score_mse": [squares_by_hand(n, ALIKE) for n in (1, 2)],
            "hidden_mse": [states_by_hand(n, ALIKE) for n in (0, 1, 2)],
        },
    ),
    "minilm": (
        minilm,
        TEACHER,
        {
            "attention_kl": [attention_by_hand(2, TEACHER)],
            "value_relation_kl": [values_by_hand(2, TEACHER)],
        },
    ),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def tensors_of(said: EncoderOutput) -> list[Tensor]:
    taps = [x for t in said.attention.values() for x in (t.queries, t.keys, t.values)]
    assert said.logits is not None
    return [*said.hidden_states.values(), *taps, said.logits]


def learnable(said: EncoderOutput) -> EncoderOutput:
    def leaf(x: Tensor) -> Tensor:
        return x.clone().requires_grad_()

    assert said.logits is not None
    return EncoderOutput(
        {n: leaf(x) for n, x in said.hidden_states.items()},
        {
            n: AttentionTap(leaf(t.queries), leaf(t.keys), leaf(t.values))
            for n, t in said.attention.items()
        },
        leaf(said.logits),
    )


def gradients(loss: Tensor, said: EncoderOutput) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors_of(said), allow_unused=True)
    pairs = zip(found, tensors_of(said), strict=True)
    return [torch.zeros_like(x) if g is None else g for g, x in pairs]


@every_form
def test_latent_loss_is_the_sum_over_the_matched_layers(form: Form) -> None:
    latent_loss, signal, by_hand = form
    losses = latent(STUDENT, signal, BATCH, latent_loss=latent_loss)
    assert set(losses.terms) == set(by_hand)
    for name, of_layers in by_hand.items():
        assert all(loss > 0.1 for loss in of_layers)
        torch.testing.assert_close(losses.terms[name], torch.stack(of_layers).sum())
    total = torch.stack([loss for layers in by_hand.values() for loss in layers]).sum()
    torch.testing.assert_close(losses.total, total, rtol=1e-12, atol=0)


@every_form
def test_a_student_that_is_its_teacher_has_nothing_to_learn(form: Form) -> None:
    student = learnable(STUDENT)
    loss = latent(student, STUDENT, BATCH, latent_loss=form[0]).total
    assert loss == 0
    assert all(g.abs().max() < 1e-14 for g in gradients(loss, student))


@every_form
def test_padding_changes_nothing(form: Form) -> None:
    latent_loss, signal, _ = form

    def longer(said: EncoderOutput) -> EncoderOutput:
        assert said.logits is not None
        return EncoderOutput(
            {n: padded(x, 1, 7.0) for n, x in said.hidden_states.items()},
            {n: padded_tap(t, 7.0) for n, t in said.attention.items()},
            torch.cat([said.logits, said.logits[:1]]),
        )

    mask = padded(MASK, 1, False)
    batch = EncoderBatch(
        torch.zeros_like(mask, dtype=torch.long), mask, labels=torch.cat([LABELS, LABELS[:1]])
    )
    found, expected = (
        ernie_tiny(ours, theirs, texts, latent_loss=latent_loss)
        for ours, theirs, texts in (
            (longer(STUDENT), longer(signal), batch),
            (STUDENT, signal, BATCH),
        )
    )
    torch.testing.assert_close(found.total, expected.total, rtol=1e-6, atol=0)
    assert set(found.terms) == set(expected.terms)
    for name, term in found.terms.items():
        torch.testing.assert_close(term, expected.terms[name], rtol=1e-6, atol=0)


def test_last_stage_is_the_weighted_sum_of_latent_soft_and_hard_losses() -> None:
    L_lat = latent(STUDENT, TEACHER, BATCH, latent_loss=RELATION).total
    z, t = STUDENT.logits, TEACHER.logits
    assert z is not None
    assert t is not None
    L_soft = 4 * F.cross_entropy(z / 2, (t / 2).softmax(-1))
    L_hard = F.cross_entropy(z, LABELS)
    method = partial(ernie_tiny, STUDENT, TEACHER, BATCH, latent_loss=RELATION, temperature=2.0)
    losses = method()
    torch.testing.assert_close(losses.total, L_lat + L_soft + L_hard, rtol=1e-12, atol=0)
    torch.testing.assert_close(losses.terms["soft_labels"], L_soft)
    torch.testing.assert_close(losses.terms["hard_labels"], L_hard)
    weighted = method(latent_weight=0.3, soft_weight=0.7, hard_weight=2.0).total
    torch.testing.assert_close(weighted, 0.3 * L_lat + 0.7 * L_soft + 2 * L_hard)


def test_a_term_of_weight_0_is_not_computed() -> None:
    """TinyBERT's last stage compares no layers; where only these are compared, no head is read."""
    method = partial(ernie_tiny, STUDENT, latent_loss=RELATION)
    no_layers = EncoderOutput(logits=TEACHER.logits)
    assert list(method(no_layers, BATCH, **SOFT).terms) == ["soft_labels"]
    assert list(method(EncoderOutput(), BATCH, **HARD).terms) == ["hard_labels"]
    no_head, no_labels = replace(TEACHER, logits=None), BATCH._replace(labels=None)
    found = method(no_head, no_labels, soft_weight=0.0, hard_weight=0.0)
    assert list(found.terms) == ["attention_kl", "hidden_relation_kl"]


@pytest.mark.parametrize(
    ("weights", "kept"),
    [
        ({"attention_weight": 0.0, "hidden_weight": 3.0}, "hidden_relation_kl"),
        ({"attention_weight": 3.0, "hidden_weight": 0.0}, "attention_kl"),
    ],
)
def test_one_of_the_two_relations_may_be_left_out(weights: dict[str, float], kept: str) -> None:
    found = latent(STUDENT, TEACHER, BATCH, latent_loss=partial(RELATION, **weights))
    assert list(found.terms) == [kept]
    expected = 3 * torch.stack(FORMS["relation"][2][kept]).sum()
    torch.testing.assert_close(found.total, expected)


def test_without_attention_the_numbers_of_heads_may_differ() -> None:
    many = replace(TEACHER, attention=output(200, width=9, heads=5).attention)
    assert refusal(RELATION, STUDENT, many, MASK).startswith("student.num_attention_heads=2: ")
    terms = RELATION(STUDENT, many, MASK, attention_weight=0.0)
    expected = RELATION(STUDENT, TEACHER, MASK)["hidden_relation_kl"]
    assert torch.equal(terms["hidden_relation_kl"], expected)


def test_relations_are_of_as_many_slices_as_there_are_heads_if_nothing_is_said() -> None:
    alike = replace(TEACHER, hidden_states=ALIKE.hidden_states)
    found = relation(STUDENT, alike, MASK)["hidden_relation_kl"]
    assert torch.equal(
        found, relation(STUDENT, alike, MASK, relation_heads=HEADS)["hidden_relation_kl"]
    )
    assert not torch.equal(found, RELATION(STUDENT, alike, MASK)["hidden_relation_kl"])


@every_form
def test_gradient_flows_to_the_student_alone(form: Form) -> None:
    student, teacher = learnable(STUDENT), learnable(form[1])
    ernie_tiny(student, teacher, BATCH, latent_loss=form[0]).total.backward()
    assert all(x.grad is None for x in tensors_of(teacher))
    assert sum(x.grad is not None and bool(x.grad.any()) for x in tensors_of(student)) >= 4


def test_gradient_of_soft_labels_is_that_of_hard_ones_where_the_teacher_is_certain() -> None:
    certain = replace(TEACHER, logits=1e3 * F.one_hot(LABELS, 4).double())
    student = learnable(STUDENT)
    soft, hard = (
        ernie_tiny(student, signal, BATCH, latent_loss=RELATION, **weights).total
        for signal, weights in ((certain, SOFT), (TEACHER, HARD))
    )
    found, expected = gradients(soft, student)[-1], gradients(hard, student)[-1]
    torch.testing.assert_close(found, expected)
    closed = (STUDENT.logits.softmax(-1) - F.one_hot(LABELS, 4)) / 3
    torch.testing.assert_close(found, closed)


def test_fine_tuning_is_the_hard_loss_alone() -> None:
    hard = ernie_tiny(STUDENT, TEACHER, BATCH, latent_loss=RELATION, **HARD)
    found = finetune(STUDENT, None, BATCH)
    assert found.total == hard.total
    assert found.terms == hard.terms


def refusal(method: Callable[..., Any], *args: Any, **options: Any) -> str:
    with pytest.raises(UserError) as refused:
        method(*args, **options)
    return str(refused.value)


@pytest.mark.parametrize("name", ["latent_weight", "soft_weight", "hard_weight"])
@pytest.mark.parametrize("value", [-0.5, float("nan")])
def test_a_weight_below_0_is_refused(name: str, value: float) -> None:
    found = refusal(ernie_tiny, STUDENT, TEACHER, BATCH, latent_loss=RELATION, **{name: value})
    assert found == f"method.{name}={value}: expected 0 or more"


@pytest.mark.parametrize("name", ["attention_weight", "hidden_weight"])
def test_a_weight_of_the_form_below_0_is_refused(name: str) -> None:
    found = refusal(RELATION, STUDENT, TEACHER, MASK, **{name: -1.0})
    assert found == f"method.latent_loss.{name}=-1.0: expected 0 or more"


def test_weights_that_leave_no_loss_are_refused() -> None:
    nothing = {"latent_weight": 0.0, "soft_weight": 0.0, "hard_weight": 0.0}
    assert refusal(ernie_tiny, STUDENT, TEACHER, BATCH, latent_loss=RELATION, **nothing) == (
        "method.latent_weight=0.0, method.soft_weight=0.0, method.hard_weight=0.0: no loss is "
        "left; expected one of them above 0"
    )
    nothing = {"attention_weight": 0.0, "hidden_weight": 0.0}
    assert refusal(RELATION, STUDENT, TEACHER, MASK, **nothing) == (
        "method.latent_loss.attention_weight=0.0, method.latent_loss.hidden_weight=0.0: no loss "
        "is left; expected one of them above 0"
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_none_is_refused(temperature: float) -> None:
    options = {"latent_loss": RELATION, "temperature": temperature}
    assert refusal(ernie_tiny, STUDENT, TEACHER, BATCH, **options) == (
        f"method.temperature={temperature}: expected a number above 0"
    )


@pytest.mark.parametrize("method", [latent, ernie_tiny])
def test_what_the_teacher_does_not_say_is_refused(method: Callable[..., Any]) -> None:
    asks = partial(method, latent_loss=RELATION)
    assert refusal(asks, STUDENT, None, BATCH) == (
        "teacher=null: this method needs one; expected teacher=encoder with teacher.path, or "
        "method=finetune"
    )
    unmatched = replace(TEACHER, attention={})
    assert refusal(asks, STUDENT, unmatched, BATCH) == (
        "stages.<stage>.family.layer_map: no block of the student is matched with one of the "
        "teacher, which L_lat compares; expected a map of some, such as "
        "layer_map@stages.<stage>.family.layer_map=uniform"
    )
