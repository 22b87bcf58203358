import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from stillhouse.objectives.divergences import named_divergence
from stillhouse.objectives.tokens import (
    log_probs,
    token_cross_entropy,
    token_divergence,
)
from stillhouse.records.language import LanguageOutput, VocabularyHead

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
