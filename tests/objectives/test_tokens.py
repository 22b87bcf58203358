from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives import tokens
from stillhouse.objectives.divergences import named_divergence
from stillhouse.objectives.tokens import (
    likeliest_tokens,
    log_probs,
    token_cross_entropy,
    token_divergence,
)
from stillhouse.records.language import LanguageOutput, TopKSignal, VocabularyHead

MASK = torch.tensor([[True, True, False], [True, False, False]])


def says(logits: Tensor) -> LanguageOutput:
    """An output whose head is the identity, so that the hidden states are the logits."""
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype)
    return LanguageOutput(hidden_states=logits, head=VocabularyHead(weight=eye))


def random_logits(V: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(2, 3, V, generator=generator, dtype=torch.float64)).to(dtype)


def divergence(name: str):
    return named_divergence(name, beta=0.5, alpha=0.1)


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, -torch.inf])
def test_masked_rubbish_reaches_neither_value_nor_gradient(rubbish):
    clean, dirty = random_logits(7, seed=0), random_logits(7, seed=0)
    dirty[~MASK] = rubbish
    clean.requires_grad_()
    dirty.requires_grad_()
    labels = torch.tensor([[3, 0, 6], [5, 1, 2]])
    signal = says(random_logits(7, seed=1))
    values = []
    for logits in (clean, dirty):
        output = says(logits)
        value = token_cross_entropy(output, labels, MASK)
        value = value + token_divergence(output, signal, MASK, divergence=divergence("jsd"))
        value.backward()
        values.append(value)
    assert torch.equal(values[0], values[1])
    assert torch.equal(clean.grad, dirty.grad)


def test_no_token_at_all_gives_zero_and_a_gradient_of_zero():
    logits = random_logits(7, seed=0).requires_grad_()
    labels = torch.tensor([[3, 0, 6], [5, 1, 2]])
    loss = token_cross_entropy(says(logits), labels, torch.zeros_like(MASK))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_cross_entropy_is_that_of_torch():
    logits = random_logits(7, seed=0)
    labels = torch.tensor([[3, 0, 6], [5, 1, 2]])
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = token_cross_entropy(says(ours), labels, MASK)
    expected = F.cross_entropy(
        theirs.flatten(0, 1), labels.masked_fill(~MASK, -100).flatten(), ignore_index=-100
    )
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_label_outside_the_vocabulary_is_harmless_where_it_is_masked():
    logits = random_logits(7, seed=0)
    labels = torch.tensor([[3, 0, 6], [5, 1, 2]])
    ignored = labels.masked_fill(~MASK, -100)
    loss = token_cross_entropy(says(logits), labels, MASK)
    assert torch.equal(token_cross_entropy(says(logits), ignored, MASK), loss)


@pytest.mark.parametrize(("student_columns", "teacher_columns"), [(9, 7), (7, 9), (9, 8)])
def test_padded_vocabularies_are_compared_on_shared_columns(student_columns, teacher_columns):
    s, t = random_logits(student_columns, seed=1), random_logits(teacher_columns, seed=2)
    shared = min(student_columns, teacher_columns)
    # A padding column that would take all the probability if it were looked at.
    s[..., shared:], t[..., shared:] = 50.0, 50.0
    measure = divergence("forward_kl")
    value = token_divergence(says(s), says(t), MASK, divergence=measure)
    P, Q = t[..., :shared].softmax(-1), s[..., :shared].softmax(-1)
    expected = (P * (P.log() - Q.log())).sum(-1)[MASK].mean()
    torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype):
    s, t = random_logits(50, seed=3, dtype=dtype), random_logits(50, seed=4, dtype=dtype)
    labels = torch.tensor([[3, 0, 6], [5, 1, 2]])
    cross_entropy = token_cross_entropy(says(s), labels, MASK)
    assert cross_entropy.dtype == torch.float32
    assert torch.equal(cross_entropy, token_cross_entropy(says(s.float()), labels, MASK))

    measure = divergence("forward_kl")
    value = token_divergence(says(s), says(t), MASK, divergence=measure)
    exact = token_divergence(says(s.double()), says(t.double()), MASK, divergence=measure)
    torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
    narrow = measure(s.log_softmax(-1), t.log_softmax(-1))[MASK].mean()
    assert abs(narrow.double() / exact - 1) > 1e-5, "the tolerance cannot tell the precisions apart"


def test_float64_logits_stay_float64():
    assert log_probs(random_logits(7, seed=5)).dtype == torch.float64


def test_temperature_divides_the_logits_of_both_sides():
    s, t = random_logits(7, seed=6), random_logits(7, seed=7)
    measure = divergence("forward_kl")

    def value(s: Tensor, t: Tensor, temperature: float = 1.0) -> Tensor:
        return token_divergence(says(s), says(t), MASK, divergence=measure, temperature=temperature)

    at_three = value(s, t, temperature=3.0)
    torch.testing.assert_close(at_three, value(s / 3, t / 3))
    for one_sided in (value(s / 3, t), value(s, t / 3), value(s, t)):
        assert abs(one_sided / at_three - 1) > 0.1


def test_no_gradient_flows_into_the_signal():
    s, t = random_logits(7, seed=8).requires_grad_(), random_logits(7, seed=9).requires_grad_()
    token_divergence(says(s), says(t), MASK, divergence=divergence("jsd")).backward()
    assert t.grad is None
    assert s.grad.abs().sum() > 0


def test_infinite_divergence_at_a_masked_position_leaves_the_gradient_finite():
    s, t = random_logits(7, seed=10).requires_grad_(), random_logits(7, seed=11)
    t[0, 2, 4] = -torch.inf
    assert not MASK[0, 2]
    loss = token_divergence(says(s), says(t), MASK, divergence=divergence("reverse_kl"))
    assert loss.isfinite()
    (gradient,) = torch.autograd.grad(loss, s)
    assert torch.equal(gradient[~MASK], torch.zeros(3, 7).double())


def kept(logits: Tensor, k: int) -> TopKSignal:
    """The k likeliest tokens, in no order."""
    top = logits.log_softmax(-1).topk(k, sorted=False)
    ids, log_p = top.indices.flip(-1), top.values.flip(-1)
    nothing = torch.zeros(2, 3)
    return TopKSignal(ids, log_p, nothing, ids[..., :0], nothing, vocabulary_size=logits.shape[-1])


@pytest.mark.parametrize("backend", [None, "streaming"])
@pytest.mark.parametrize("student_columns", [9, 7])
def test_likeliest_tokens_are_those_of_the_shared_columns(backend, student_columns):
    s, t = random_logits(student_columns, seed=12), random_logits(8, seed=13)
    t[..., 7] = 50.0
    student = replace(says(s), loss_backend=backend)
    expected = t[..., :student_columns].argmax(-1)[MASK]
    assert torch.equal(likeliest_tokens(student, says(t), MASK), expected)
    assert torch.equal(likeliest_tokens(student, kept(t, 3), MASK), expected)
    assert (expected == 7).all() == (student_columns == 9)


def test_likeliest_tokens_hold_few_logits_where_the_loss_does(monkeypatch):
    held = []
    head = VocabularyHead.__call__

    def watched(self: VocabularyHead, states: Tensor) -> Tensor:
        held.append(len(states))
        return head(self, states)

    monkeypatch.setattr(VocabularyHead, "__call__", watched)
    monkeypatch.setattr(tokens, "LOGITS_HELD", 2 * 7)
    student, signal = says(random_logits(7, seed=0)), says(random_logits(7, seed=1))
    expected = likeliest_tokens(student, signal, MASK)
    assert held == [3]
    found = likeliest_tokens(replace(student, loss_backend="streaming"), signal, MASK)
    assert held == [3, 2, 1]
    assert torch.equal(found, expected)
    none = torch.zeros_like(MASK)
    for backend in (None, "streaming"):
        student = replace(student, loss_backend=backend)
        assert likeliest_tokens(student, signal, none).shape == (0,)


def test_kept_tokens_that_the_student_does_not_know_are_refused():
    t = random_logits(9, seed=14)
    t[0, 1, 7:] = 50.0
    with pytest.raises(UserError) as refusal:
        likeliest_tokens(says(random_logits(7, seed=15)), kept(t, 2), MASK)
    assert str(refusal.value) == (
        "codec.k=2: at some positions the student knows none of the kept tokens, only those below "
        "7; expected more tokens, or teacher=live"
    )
