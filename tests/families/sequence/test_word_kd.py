import pytest
import torch
from torch import Tensor

from stillhouse.families.sequence.sft import sft
from stillhouse.families.sequence.word_kd import word_kd
from stillhouse.objectives.divergences import jsd, skew_forward_kl, skew_reverse_kl
from stillhouse.records.language import LanguageOutput, SequenceBatch, VocabularyHead

V = 7
MASK = torch.tensor([[True, True, False], [True, False, False]])
BATCH = SequenceBatch(
    input_ids=torch.tensor([[1, 3, 0], [2, 5, 5]]),
    labels=torch.tensor([[3, 0, 6], [5, 1, 2]]),
    mask=MASK,
)


def says(logits: Tensor) -> LanguageOutput:
    """An output whose head is the identity, so that the hidden states are the logits."""
    eye = torch.eye(V, dtype=logits.dtype)
    return LanguageOutput(hidden_states=logits, head=VocabularyHead(weight=eye))


def random_logits(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(2, 3, V, generator=generator, dtype=torch.float64)


def value_and_gradient(method, s: Tensor, *args, **options) -> tuple[Tensor, Tensor]:
    s = s.clone().requires_grad_()
    total = method(says(s), *args, **options).total
    return total.detach(), torch.autograd.grad(total, s)[0]


@pytest.mark.parametrize(("squared", "factor"), [(True, 4.0), (False, 1.0)])
def test_loss_and_gradient_are_hinton_s(squared, factor):
    s, t, tau = random_logits(0), random_logits(1), 2.0
    total, gradient = value_and_gradient(
        word_kd,
        s,
        says(t),
        BATCH,
        temperature=tau,
        scale_by_temperature_squared=squared,
    )
    P, Q = (t / tau).softmax(-1), (s / tau).softmax(-1)
    per_token = [(P[b, n] * (P[b, n] / Q[b, n]).log()).sum() for b, n in [(0, 0), (0, 1), (1, 0)]]
    torch.testing.assert_close(total, factor * sum(per_token) / 3)
    torch.testing.assert_close(gradient, factor * MASK.unsqueeze(-1) * (Q - P) / tau / 3)


@pytest.mark.parametrize(
    ("options", "measure"),
    [
        ({"divergence": "jsd", "beta": 0.2}, lambda q, p: jsd(q, p, beta=0.2)),
        (
            {"divergence": "skew_forward_kl", "alpha": 0.3},
            lambda q, p: skew_forward_kl(q, p, alpha=0.3),
        ),
        (
            {"divergence": "skew_reverse_kl", "alpha": 0.3},
            lambda q, p: skew_reverse_kl(q, p, alpha=0.3),
        ),
    ],
)
def test_divergence_and_its_weight_are_those_asked_for(options, measure):
    s, t = random_logits(2), random_logits(3)
    losses = word_kd(says(s), says(t), BATCH, **options)
    expected = measure(s.log_softmax(-1), t.log_softmax(-1))[MASK].mean()
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.terms[options["divergence"]], expected)


@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_total_mixes_distillation_and_cross_entropy_by_weight(w):
    s, t, tau = random_logits(4), random_logits(5), 3.0
    mixed = value_and_gradient(word_kd, s, says(t), BATCH, temperature=tau, cross_entropy_weight=w)
    pure = value_and_gradient(word_kd, s, says(t), BATCH, temperature=tau)
    supervised = value_and_gradient(sft, s, None, BATCH)
    for ours, kd, ce in zip(mixed, pure, supervised, strict=True):
        assert not torch.allclose(kd, ce)
        torch.testing.assert_close(ours, (1 - w) * kd + w * ce)


def test_terms_are_the_parts_before_scaling_and_carry_no_gradient():
    s, t = random_logits(6).requires_grad_(), random_logits(7)
    losses = word_kd(says(s), says(t), BATCH, temperature=2.0, cross_entropy_weight=0.25)
    forward_kl, cross_entropy = losses.terms["forward_kl"], losses.terms["cross_entropy"]
    torch.testing.assert_close(losses.total, 0.75 * 4.0 * forward_kl + 0.25 * cross_entropy)
    assert not any(term.requires_grad for term in losses.terms.values())


def test_teacher_that_is_the_data_makes_it_supervised_fine_tuning():
    s = random_logits(8)
    one_hot = 1e4 * torch.nn.functional.one_hot(BATCH.labels, V).double()
    distilled = value_and_gradient(word_kd, s, says(one_hot), BATCH)
    supervised = value_and_gradient(sft, s, None, BATCH)
    for ours, theirs in zip(distilled, supervised, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_masked_positions_do_not_matter():
    s, t = random_logits(9), random_logits(10)
    options = {"temperature": 2.0, "cross_entropy_weight": 0.5}
    total, gradient = value_and_gradient(word_kd, s, says(t), BATCH, **options)
    hidden = ~MASK.unsqueeze(-1)
    other_batch = SequenceBatch(BATCH.input_ids, BATCH.labels.masked_fill(~MASK, -100), MASK)
    other_total, other_gradient = value_and_gradient(
        word_kd,
        torch.where(hidden, 100 * random_logits(11), s),
        says(torch.where(hidden, 100 * random_logits(12), t)),
        other_batch,
        **options,
    )
    torch.testing.assert_close(other_total, total)
    torch.testing.assert_close(other_gradient, gradient)
    assert torch.equal(gradient[~MASK], torch.zeros(3, V).double())


def test_no_gradient_reaches_the_teacher():
    s, t = random_logits(13).requires_grad_(), random_logits(14).requires_grad_()
    word_kd(says(s), says(t), BATCH, cross_entropy_weight=0.5).total.backward()
    assert s.grad is not None
    assert t.grad is None
