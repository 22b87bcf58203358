"""Losses between layers against einsum on texts without padding, and their invariances."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from encoder_outputs import (
    MASK,
    draw,
    kl,
    mean_over_texts,
    padded,
    padded_tap,
    scores,
    slices,
    tap,
)
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.relations import (
    attention_kl,
    attention_score_mse,
    hidden_relation_kl,
    hidden_state_mse,
    value_relation_kl,
)
from stillhouse.records.encoders import AttentionTap

H = 2
S, T = tap(0, heads=H), tap(10, heads=H, width=4)
S_STATES, T_STATES = draw(*MASK.shape, 6, seed=20), draw(*MASK.shape, 10, seed=21)
STATES = S_STATES, T_STATES
PROJECTED = draw(*MASK.shape, 10, seed=22)
Case = tuple[Callable[..., Tensor], Any, Any, Callable[[int, int], Tensor]]


def attention_by_hand(b: int, n: int) -> Tensor:
    ours, theirs = (scores(t.queries[b, :, :n], t.keys[b, :, :n]) for t in (S, T))
    return kl(theirs, ours)


def scores_by_hand(b: int, n: int) -> Tensor:
    ours, theirs = (scores(t.queries[b, :, :n], t.keys[b, :, :n]) for t in (S, T))
    return ((ours - theirs) ** 2).mean()


def values_by_hand(b: int, n: int) -> Tensor:
    ours, theirs = (scores(t.values[b, :, :n], t.values[b, :, :n]) for t in (S, T))
    return kl(theirs, ours)


def hidden_by_hand(b: int, n: int) -> Tensor:
    ours, theirs = (slices(x[b, :n], H) for x in (S_STATES, T_STATES))
    return kl(scores(theirs, theirs), scores(ours, ours))


def states_by_hand(b: int, n: int) -> Tensor:
    return ((PROJECTED[b, :n] - T_STATES[b, :n]) ** 2).mean()


CASES: dict[str, Case] = {
    "attention_kl": (attention_kl, S, T, attention_by_hand),
    "attention_score_mse": (attention_score_mse, S, T, scores_by_hand),
    "value_relation_kl": (value_relation_kl, S, T, values_by_hand),
    "hidden_relation_kl": (
        partial(hidden_relation_kl, heads=H),
        S_STATES,
        T_STATES,
        hidden_by_hand,
    ),
    "hidden_state_mse": (hidden_state_mse, PROJECTED, T_STATES, states_by_hand),
}
every_loss = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def leaves(layer: Any) -> list[Tensor]:
    return [layer.queries, layer.keys, layer.values] if isinstance(layer, AttentionTap) else [layer]


def changed(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    of_leaves = [change(leaf) for leaf in leaves(layer)]
    return AttentionTap(*of_leaves) if isinstance(layer, AttentionTap) else of_leaves[0]


def learnable(layer: Any) -> Any:
    return changed(layer, lambda leaf: leaf.clone().requires_grad_())


def gradients(loss: Tensor, layer: Any) -> list[Tensor]:
    found = torch.autograd.grad(loss, leaves(layer), allow_unused=True)
    pairs = zip(found, leaves(layer), strict=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


@every_loss
def test_value_is_the_mean_over_texts_of_what_is_worked_out_by_hand(case: Case) -> None:
    loss, student, teacher, by_hand = case
    expected = mean_over_texts(by_hand)
    assert expected > 0.1
    torch.testing.assert_close(loss(student, teacher, MASK), expected, rtol=1e-12, atol=0)


@every_loss
def test_gradient_is_the_difference_quotient_s_and_flows_to_the_student_alone(case: Case) -> None:
    loss, student, teacher, _ = case
    ours, theirs = learnable(student), learnable(teacher)
    found = gradients(loss(ours, theirs, MASK), ours)
    assert not any(g.any() for g in gradients(loss(ours, theirs, MASK), theirs))
    directions = [draw(*leaf.shape, seed=30 + i) for i, leaf in enumerate(leaves(student))]

    def along(step: float) -> Tensor:
        moves = iter(directions)
        return loss(changed(student, lambda leaf: leaf + step * next(moves)), teacher, MASK)

    slope = (along(1e-6) - along(-1e-6)) / 2e-6
    expected = sum((g * d).sum() for g, d in zip(found, directions, strict=True))
    torch.testing.assert_close(slope, expected, rtol=1e-6, atol=1e-9)


@every_loss
@pytest.mark.parametrize("rubbish", [0.0, 7.0, torch.nan, torch.inf])
def test_padding_changes_neither_value_nor_gradient(case: Case, rubbish: float) -> None:
    """Three more positions, and a text of nothing else."""
    loss, student, teacher, _ = case
    dims = 2 if isinstance(student, AttentionTap) else 1
    ours = learnable(student)
    longer = [
        padded_tap(layer, rubbish) if dims == 2 else padded(layer, dims, rubbish)
        for layer in (ours, teacher)
    ]
    mask = padded(MASK, 1, False)
    found, expected = loss(*longer, mask), loss(ours, teacher, MASK)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    for ours_found, ours_expected in zip(
        gradients(found, ours), gradients(expected, ours), strict=True
    ):
        torch.testing.assert_close(ours_found, ours_expected, rtol=1e-9, atol=1e-12)


@every_loss
def test_a_batch_of_padding_alone_costs_nothing(case: Case) -> None:
    loss, student, teacher, _ = case
    ours = learnable(student)
    value = loss(ours, teacher, torch.zeros_like(MASK))
    assert value == 0
    assert not any(g.any() for g in gradients(value, ours))


@every_loss
def test_a_student_that_is_its_teacher_has_nothing_to_learn(case: Case) -> None:
    loss, student, _, _ = case
    ours = learnable(student)
    value = loss(ours, student, MASK)
    assert value == 0
    for gradient in gradients(value, ours):
        assert gradient.abs().max() < 1e-15


@every_loss
def test_half_precision_is_computed_in_float32_also_under_autocast(case: Case) -> None:
    loss, *layers, _ = case
    half = [changed(layer, lambda leaf: leaf.bfloat16()) for layer in layers]
    exact = loss(*(changed(layer, lambda leaf: leaf.double()) for layer in half), MASK)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*half, MASK)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_slices_may_be_turned_and_only_they() -> None:
    """R is unchanged by an orthogonal matrix inside each slice, not by one across slices."""
    turns = [torch.linalg.qr(draw(3, 3, seed=40 + a)).Q for a in range(H)]
    inside, across = torch.block_diag(*turns), torch.linalg.qr(draw(6, 6, seed=50)).Q
    loss = partial(hidden_relation_kl, teacher=T_STATES, mask=MASK, heads=H)
    expected = loss(S_STATES)
    torch.testing.assert_close(loss(S_STATES @ inside), expected, rtol=1e-10, atol=0)
    assert (loss(S_STATES @ across) - expected).abs() > 1e-2


def test_a_constant_on_a_row_of_scores_is_seen_by_the_squared_error_alone() -> None:
    """One more feature, 1 in every key: what the query has there is added to its whole row."""
    constants = draw(MASK.shape[0], H, MASK.shape[1], 1, seed=60)
    scale = (4 / 3) ** 0.5
    shifted = AttentionTap(
        torch.cat([scale * S.queries, 2 * constants], -1),
        torch.cat([S.keys, torch.ones_like(constants)], -1),
        torch.cat([S.values, constants], -1),
    )
    of_rows, changed_rows = (scores(t.queries, t.keys) for t in (S, shifted))
    torch.testing.assert_close(changed_rows, of_rows + constants)
    expected = attention_kl(S, T, MASK)
    torch.testing.assert_close(attention_kl(shifted, T, MASK), expected, rtol=1e-10, atol=0)
    squares = [attention_score_mse(layer, T, MASK) for layer in (S, shifted)]
    assert (squares[0] - squares[1]).abs() > 0.1


@pytest.mark.parametrize("loss", [attention_kl, attention_score_mse, value_relation_kl])
def test_unequal_numbers_of_heads_are_refused(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(UserError) as refused:
        loss(tap(0, heads=2), tap(1, heads=12), MASK)
    assert str(refused.value) == (
        "student.num_attention_heads=2: the teacher has 12 heads, and attention is compared head "
        "by head; set it to 12, or compare hidden states alone with the relation form: "
        "latent@method.latent_loss=relation method.latent_loss.attention_weight=0"
    )


@pytest.mark.parametrize("heads", [0, 3, 10])
def test_slices_that_do_not_divide_both_widths_are_refused(heads: int) -> None:
    with pytest.raises(UserError) as refused:
        hidden_relation_kl(S_STATES, T_STATES, MASK, heads=heads)
    assert str(refused.value) == (
        f"method.latent_loss.relation_heads={heads}: hidden states are 6 wide in the student, 10 "
        "in the teacher; expected a divisor of both, 2 at most"
    )


def test_unequal_widths_of_compared_states_are_refused() -> None:
    with pytest.raises(UserError) as refused:
        hidden_state_mse(S_STATES, T_STATES, MASK)
    assert str(refused.value) == (
        "stages.<stage>.family.projection=false: hidden states are 6 wide in the student, 10 in "
        "the teacher; set it to true, or take the relation form with "
        "latent@method.latent_loss=relation"
    )
