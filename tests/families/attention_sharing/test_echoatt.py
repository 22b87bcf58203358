"""EchoAtt's loss against plain torch on the forward of `transformers`, in float64."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attention_sharers import FOLLOWERS, full_model, some_ids
from torch import Tensor
from training import bare_trainer, plain_sgd

from stillhouse.data.encoding import text_as_tokens
from stillhouse.data.language import KeptBatches
from stillhouse.data.windows import TokenWindows, collate_windows
from stillhouse.errors import UserError
from stillhouse.families.attention_sharing.echoatt import echoatt
from stillhouse.families.sequence.module import SequenceDistiller
from stillhouse.records.language import LanguageOutput, SequenceBatch
from stillhouse.students.causal_lm import read_output
from stillhouse.students.shared_attention import share_attention
from stillhouse.students.sharing import group_ends, sharing_of, write_sharing
from stillhouse.teachers.live import LiveTeacher

DOCUMENTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5], [3, 5], [8, 9, 7, 9], [3]]
WINDOWS = TokenWindows(
    [text_as_tokens(d, 0) for d in DOCUMENTS], length=16, end_token=0, packing=False
).in_order()
collate = partial(collate_windows, pad_token=0)
MICRO_BATCHES = [collate(WINDOWS[:1]), collate(WINDOWS[1:3]), collate(WINDOWS[3:])]
# Padded, and one more token masked; all rows have other lengths.
BATCH = collate(WINDOWS)
BATCH.mask[0, 3] = False
LAYERS = (1, 3)
ONLY = {
    "intermediate": {"intermediate_weight": 1.0, "soft_weight": 0.0, "hard_weight": 0.0},
    "soft": {"intermediate_weight": 0.0, "soft_weight": 1.0, "hard_weight": 0.0},
    "hard": {"intermediate_weight": 0.0, "soft_weight": 0.0, "hard_weight": 1.0},
}


@pytest.fixture
def model(tiny_llama):
    return partial(tiny_llama, num_hidden_layers=4)


def by_hand(student, teacher, batch: SequenceBatch = BATCH) -> dict[str, Tensor]:
    """Return the mean of each term over the tokens that count, both KLs, from rows without padding.

    The groups of `LAYERS` end behind blocks 0 and 2.
    """
    sums: dict[str, Tensor | float] = {}
    count = 0
    for ids, mask in zip(batch.input_ids, batch.mask, strict=True):
        length = int(mask.nonzero().max()) + 1
        ids, mask = ids[None, :length], mask[:length]
        ours = student(ids, output_hidden_states=True)
        with torch.no_grad():
            theirs = teacher(ids, output_hidden_states=True)
        log_q, log_p = (o.logits[0].log_softmax(-1) for o in (ours, theirs))
        squares = [
            ((ours.hidden_states[i] - theirs.hidden_states[i])[0] ** 2).sum(-1) / 16 for i in LAYERS
        ]
        label = log_p.argmax(-1)
        per_token = {
            "intermediate": (squares[0] + squares[1]) / 2,
            "soft": (log_q.exp() * (log_q - log_p)).sum(-1),
            "forward": (log_p.exp() * (log_p - log_q)).sum(-1),
            "hard": -log_q[torch.arange(length), label],
        }
        count += int(mask.sum())
        for name, values in per_token.items():
            sums[name] = sums.get(name, 0.0) + values[mask].sum()
    return {name: total / count for name, total in sums.items()}


def ours(student, teacher, batch: SequenceBatch = BATCH, layers=LAYERS, backend=None, **options):
    output = replace(read_output(student, batch, layers=layers), loss_backend=backend)
    return echoatt(output, LiveTeacher(teacher, layers)(batch), batch, **options)


def gradient(loss: Tensor, model) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for g, p in zip(found, model.parameters(), strict=True)
        ]
    )


@pytest.mark.parametrize("term", ["intermediate", "soft", "hard"])
def test_each_term_alone_is_the_one_computed_by_hand(model, term) -> None:
    student, teacher = model(1), model(2)
    found, expected = ours(student, teacher, **ONLY[term]).total, by_hand(student, teacher)[term]
    assert expected > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        gradient(found, student), gradient(expected, student), rtol=1e-8, atol=1e-12
    )


def test_the_total_is_the_paper_s_sum(model) -> None:
    student, teacher = model(1), model(2)
    losses, terms = ours(student, teacher), by_hand(student, teacher)
    expected = 0.25 * terms["intermediate"] + 0.25 * terms["soft"] + 0.5 * terms["hard"]
    torch.testing.assert_close(losses.total, expected, rtol=1e-10, atol=0)
    assert list(losses.terms) == ["hidden_mse", "reverse_kl", "hard_cross_entropy"]
    for found, name in zip(losses.terms.values(), ("intermediate", "soft", "hard"), strict=True):
        torch.testing.assert_close(found, terms[name].detach(), rtol=1e-10, atol=0)
        assert not found.requires_grad

    weighted = ours(student, teacher, intermediate_weight=2.0, soft_weight=3.0, hard_weight=0.7)
    expected = 2 * terms["intermediate"] + 3 * terms["soft"] + 0.7 * terms["hard"]
    torch.testing.assert_close(weighted.total, expected, rtol=1e-10, atol=0)


def test_the_other_direction_of_the_kl_is_a_flag(model) -> None:
    student, teacher = model(1), model(2)
    terms = by_hand(student, teacher)
    assert abs(terms["forward"] / terms["soft"] - 1) > 1e-3, "the directions are too alike"
    forward = ours(student, teacher, divergence="forward_kl", **ONLY["soft"])
    torch.testing.assert_close(forward.total, terms["forward"], rtol=1e-10, atol=0)
    assert list(forward.terms) == ["forward_kl"]


def test_a_student_that_is_its_teacher_is_only_less_certain_than_its_own_likeliest_token(
    model,
) -> None:
    same = model(1)
    losses = ours(same, same)
    log_p = read_output(same, BATCH).logits[BATCH.mask].log_softmax(-1)
    assert losses.terms["hidden_mse"] == 0
    assert losses.terms["reverse_kl"] == 0
    hard = F.cross_entropy(log_p, log_p.argmax(-1))
    assert hard > 0.1
    torch.testing.assert_close(losses.terms["hard_cross_entropy"], hard.detach())


def test_nothing_shared_leaves_the_other_terms(model) -> None:
    student, teacher = model(1), model(2)
    losses, terms = ours(student, teacher, layers=()), by_hand(student, teacher)
    assert losses.terms["hidden_mse"] == 0
    expected = 0.25 * terms["soft"] + 0.5 * terms["hard"]
    torch.testing.assert_close(losses.total, expected, rtol=1e-10, atol=0)


def test_without_the_other_weights_it_is_distillation_with_hard_labels(model) -> None:
    student, teacher = model(1), model(2)
    logits = teacher(BATCH.input_ids, attention_mask=BATCH.attention_mask.long()).logits
    labels = logits.argmax(-1).masked_fill(~BATCH.mask, -100)
    said = student(BATCH.input_ids, attention_mask=BATCH.attention_mask.long()).logits
    expected = F.cross_entropy(said.flatten(0, 1), labels.flatten())
    losses = ours(student, teacher, **ONLY["hard"])
    torch.testing.assert_close(losses.total, expected, rtol=1e-10, atol=0)
    assert list(losses.terms) == ["hard_cross_entropy"]


def test_a_constant_added_to_the_teacher_s_logits_changes_nothing(model) -> None:
    student, teacher = model(1), model(2)
    signal = LiveTeacher(teacher)(BATCH)
    shift = torch.linspace(-5, 5, BATCH.mask.numel(), dtype=torch.float64).reshape(BATCH.mask.shape)
    # One more feature, which every token's row of the head weighs with 1.
    shifted = replace(
        signal,
        hidden_states=torch.cat([signal.hidden_states, shift.unsqueeze(-1)], -1),
        head=replace(signal.head, weight=F.pad(signal.head.weight, (0, 1), value=1.0)),
    )
    torch.testing.assert_close(shifted.logits, signal.logits + shift.unsqueeze(-1))
    output = read_output(student, BATCH)
    expected = echoatt(output, signal, BATCH, **ONLY["soft"]).total
    found = echoatt(output, shifted, BATCH, **ONLY["soft"]).total
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


def test_the_data_s_labels_and_masked_positions_do_not_matter(model) -> None:
    student, signal = model(1), LiveTeacher(model(2), LAYERS)(BATCH)
    output = read_output(student, BATCH, layers=LAYERS)
    expected = echoatt(output, signal, BATCH).total

    def spoilt(said: LanguageOutput) -> LanguageOutput:
        states = said.hidden_states.masked_fill(~BATCH.mask.unsqueeze(-1), torch.nan)
        layers = {
            n: s.masked_fill(~BATCH.mask.unsqueeze(-1), torch.inf) for n, s in said.layers.items()
        }
        return replace(said, hidden_states=states, layers=layers)

    other = BATCH._replace(labels=torch.full_like(BATCH.labels, -100))
    assert torch.equal(echoatt(spoilt(output), spoilt(signal), other).total, expected)


def test_gradient_flows_to_the_student_alone(model) -> None:
    student, teacher = model(1), model(2)
    signal = read_output(teacher, BATCH, layers=LAYERS)
    echoatt(read_output(student, BATCH, layers=LAYERS), signal, BATCH).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert all(p.grad.abs().sum() > 0 for p in student.parameters())


@pytest.mark.parametrize("backend", ["reference", "streaming"])
def test_without_logits_it_is_the_same(model, backend: str) -> None:
    student, teacher = model(1), model(2)
    expected, found = ours(student, teacher), ours(student, teacher, backend=backend)
    torch.testing.assert_close(found.total, expected.total, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        gradient(found.total, student), gradient(expected.total, student), rtol=1e-8, atol=1e-12
    )


def test_a_step_over_unequal_micro_batches_is_that_of_the_mean_over_all_tokens(
    model, tmp_path
) -> None:
    student, teacher = model(1), model(2)
    terms = by_hand(student, teacher, collate(WINDOWS))
    total = 0.25 * terms["intermediate"] + 0.25 * terms["soft"] + 0.5 * terms["hard"]
    expected, total = gradient(total, student), total.item()
    before = torch.cat([p.detach().flatten() for p in student.parameters()])
    distiller = SequenceDistiller(
        student, LiveTeacher(teacher, LAYERS), echoatt, plain_sgd, layers=LAYERS
    )
    trainer = bare_trainer(tmp_path, max_steps=1, accumulate_grad_batches=3)
    trainer.fit(distiller.train(), KeptBatches(MICRO_BATCHES), KeptBatches(MICRO_BATCHES))
    after = torch.cat([p.detach().flatten() for p in student.parameters()])
    # The count that divides is in float32.
    assert (before - after - expected).norm() < 1e-6 * expected.norm()
    metrics = trainer.callback_metrics
    assert float(metrics["train_loss"]) == pytest.approx(total, rel=1e-6)
    assert float(metrics["train_hidden_mse"]) == pytest.approx(
        terms["intermediate"].item(), rel=1e-6
    )


def test_groups_end_at_their_last_follower(tmp_path) -> None:
    """Of groups 1-2 and 3-5: what blocks 2 and 5 of a student hand on, the latter normalised."""
    sharing = sharing_of(FOLLOWERS, 6, key="followers")
    write_sharing(sharing, tmp_path)
    layers = group_ends(sharing_path=str(tmp_path))
    student = share_attention(full_model("llama"), sharing, where="student").eval()
    handed_on = {}
    for index, block in enumerate(student.model.layers):
        block.register_forward_hook(lambda *call, index=index: handed_on.update({index: call[2]}))
    ids = some_ids(2, 5)
    batch = SequenceBatch(ids, ids, torch.ones_like(ids, dtype=torch.bool))
    output = read_output(student, batch, layers=layers)
    assert list(output.layers) == [3, 6]
    assert torch.equal(output.layers[3], handed_on[2])
    assert torch.equal(output.layers[6], student.model.norm(handed_on[5]))


def refusal(student: LanguageOutput, signal: LanguageOutput, **options) -> str:
    with pytest.raises(UserError) as caught:
        echoatt(student, signal, BATCH, **options)
    return str(caught.value)


def test_layers_that_the_other_has_not_are_refused(model) -> None:
    def said(*layers: int) -> LanguageOutput:
        return read_output(model(1), BATCH, layers=layers)

    assert refusal(said(), said(3, 1)) == (
        "stages.<stage>.family.layers=[]: the teacher's signal has the hidden states of [1, 3]; "
        "set teacher.layers and this to the same layers"
    )
    assert refusal(said(1), said()) == (
        "stages.<stage>.family.layers=[1]: the teacher's signal has the hidden states of []; "
        "set teacher.layers and this to the same layers"
    )
    echoatt(said(), said(1, 3), BATCH, intermediate_weight=0.0)


def test_a_student_of_another_width_is_refused(model) -> None:
    narrow = read_output(model(1, hidden_size=8), BATCH, layers=(1,))
    assert refusal(narrow, read_output(model(2), BATCH, layers=(1,))) == (
        "method.intermediate_weight=0.25: behind layer 1 the student is 8 wide, the teacher 16; "
        "expected a student cut from this teacher, or 0"
    )


@pytest.mark.parametrize("name", ["intermediate_weight", "soft_weight", "hard_weight"])
@pytest.mark.parametrize("value", [-0.1, float("nan")])
def test_a_weight_below_0_is_refused(model, name: str, value: float) -> None:
    said = read_output(model(1), BATCH)
    assert refusal(said, said, **{name: value}) == f"method.{name}={value}: expected 0 or more"


def test_weights_that_leave_no_loss_are_refused(model) -> None:
    said = read_output(model(1), BATCH)
    assert refusal(said, said, **ONLY["intermediate"]) == (
        "method.soft_weight=0.0, method.hard_weight=0.0: with method.intermediate_weight=1.0 and 0 "
        "groups no loss is left; expected one of the two above 0"
    )
