import itertools
import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from stillhouse.objectives.divergences import (
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    total_variation,
)
from stillhouse.objectives.tokens import token_divergence
from stillhouse.objectives.top_k import top_k_divergence
from stillhouse.records.language import LanguageOutput, TopKSignal, VocabularyHead

V, K, ROWS = 12, 5, 7
DIVERGENCES = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": partial(jsd, beta=0.3),
    "skew_forward_kl": partial(skew_forward_kl, alpha=0.1),
    "skew_reverse_kl": partial(skew_reverse_kl, alpha=0.1),
    "total_variation": total_variation,
}


def logits(seed: int, width: int = V) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(ROWS, width, generator=generator, dtype=torch.float64)


def top(t: torch.Tensor, k: int = K, samples: int = 0, seed: int = 0) -> TopKSignal:
    """What a cache in double precision would hold of these logits."""
    log_p = t.log_softmax(-1)
    kept = log_p.topk(k, -1)
    rest = log_p.scatter(-1, kept.indices, -torch.inf)
    residual = rest.logsumexp(-1)
    drawn, entropy = torch.zeros(len(t), 0, dtype=torch.long), torch.zeros_like(residual)
    if k < t.shape[-1]:
        tail = (rest - residual.unsqueeze(-1)).exp()
        entropy = -(tail * tail.log().masked_fill(tail == 0, 0)).sum(-1)
        if samples:
            generator = torch.Generator().manual_seed(seed)
            drawn = tail.multinomial(samples, replacement=True, generator=generator)
    return TopKSignal(kept.indices, kept.values, residual, drawn, entropy, t.shape[-1])


def of_tokens(ids, log_probs, log_residual) -> TopKSignal:
    """A signal by hand, without draws."""
    drawn = torch.zeros(len(ids), 0, dtype=torch.long)
    return TopKSignal(ids, log_probs, log_residual, drawn, torch.zeros_like(log_residual), V)


def batched(signal):
    """Rows as a batch of one sequence."""
    tensors = {n: t.unsqueeze(0) for n, t in vars(signal).items() if isinstance(t, torch.Tensor)}
    return replace(signal, **tensors)


def says(s: torch.Tensor) -> LanguageOutput:
    return LanguageOutput(s, VocabularyHead(torch.eye(s.shape[-1], dtype=s.dtype)))


def value_and_gradient(s, signal, divergence, **options):
    s = s.clone().requires_grad_()
    mask = torch.ones(1, len(s), dtype=torch.bool)
    student = says(s.unsqueeze(0))
    loss = token_divergence(student, batched(signal), mask, divergence=divergence, **options)
    return loss.detach(), torch.autograd.grad(loss, s)[0]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_tokens_kept_equal_the_dense_signal(name, temperature):
    s, t = logits(0), logits(1)
    found = value_and_gradient(s, top(t, V), DIVERGENCES[name], temperature=temperature)
    dense = value_and_gradient(s, says(t), DIVERGENCES[name], temperature=temperature)
    torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-12)


def test_forward_kl_and_its_gradient_are_the_card_s():
    s, t = logits(0), logits(1)
    signal = top(t)
    loss, gradient = value_and_gradient(s, signal, forward_kl)
    Q, v = s.softmax(-1), signal.log_probs.exp()
    kept = torch.zeros(ROWS, V, dtype=torch.bool).scatter(-1, signal.token_ids, True)
    m, Q_I = v.sum(-1), Q.masked_fill(~kept, 0).sum(-1)
    q = Q.gather(-1, signal.token_ids)
    expected = (v * (v / q).log()).sum(-1) + (1 - m) * ((1 - m) / (1 - Q_I)).log()
    torch.testing.assert_close(loss, expected.mean())
    on_kept = Q - torch.zeros_like(Q).scatter(-1, signal.token_ids, v)
    on_tail = Q - ((1 - m) / (1 - Q_I)).unsqueeze(-1) * Q
    torch.testing.assert_close(gradient, torch.where(kept, on_kept, on_tail) / ROWS)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_that_agrees_on_kept_tokens_and_tail_has_no_loss(name, temperature):
    """The tail's shape is free, at any temperature."""
    t = logits(1)
    signal = top(t)
    s = t.clone()
    for row in range(ROWS):
        tail = [j for j in range(V) if j not in signal.token_ids[row]]
        s[row, tail] = signal.log_residual[row] - math.log(len(tail)) + t[row].logsumexp(-1)
    loss, gradient = value_and_gradient(s, signal, DIVERGENCES[name], temperature=temperature)
    assert abs(float(loss)) < 1e-12
    if name != "total_variation":
        assert gradient.abs().max() < 1e-12
    assert (s - t).abs().max() > 0.1


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_coarse_divergence_is_at_most_the_dense_one(name):
    s, t = logits(0), logits(1)
    coarse, _ = value_and_gradient(s, top(t), DIVERGENCES[name])
    dense, _ = value_and_gradient(s, says(t), DIVERGENCES[name])
    assert 0 < coarse < dense


@pytest.mark.parametrize(("residual", "kept_mass"), [(True, 0.55), (False, 1.0)])
def test_descent_on_free_logits_reaches_the_optimum_of_the_card(residual, kept_mass):
    """m = 0.55, k = 5: with the bucket Q_I = v and tail 0.45, without it v/0.55 and tail 0."""
    v = torch.tensor([[0.2, 0.15, 0.1, 0.07, 0.03]], dtype=torch.float64)
    rest = torch.tensor([math.log(0.45) if residual else -math.inf], dtype=torch.float64)
    signal = of_tokens(torch.tensor([[3, 1, 7, 0, 9]]), v.log(), rest)
    s = torch.zeros(1, V, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([s], max_iter=500, tolerance_grad=1e-12, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = top_k_divergence(s, signal, divergence=forward_kl).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    Q = s.detach().softmax(-1)
    tolerance = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(Q.gather(-1, signal.token_ids), v * kept_mass / 0.55, **tolerance)
    tail = 1 - float(Q.gather(-1, signal.token_ids).sum())
    assert tail == pytest.approx(1 - kept_mass, abs=1e-4)


@pytest.mark.parametrize("k", [5, 14])
def test_tokens_that_the_student_s_vocabulary_lacks_are_impossible(k):
    """A teacher whose head has two padding rows more, likely ones: as the dense comparison."""
    s, t = logits(0), logits(1, V + 2)
    t[:, V:] += 3.0
    found = value_and_gradient(s, top(t, k), forward_kl)
    assert all(torch.isfinite(x).all() for x in found)
    if k == V + 2:
        dense = value_and_gradient(s, says(t), forward_kl)
        torch.testing.assert_close(found, dense, rtol=1e-10, atol=1e-12)


def test_a_tail_far_below_the_precision_of_1_still_has_its_gradient():
    s = torch.zeros(1, V, dtype=torch.float32)
    s[0, 0] = 40.0
    half = torch.log(torch.tensor([0.5]))
    signal = of_tokens(torch.tensor([[0]]), half.unsqueeze(0), half)
    loss, gradient = value_and_gradient(s, signal, forward_kl)
    tail_logit = math.log(V - 1) - 40.0
    assert float(loss) == pytest.approx(-math.log(2) - 0.5 * tail_logit, rel=1e-5)
    assert float(gradient[0, 0]) == pytest.approx(0.5, rel=1e-5)
    assert gradient[0, 1:].sum() == pytest.approx(-0.5, rel=1e-5)


@pytest.mark.parametrize("samples", [1, 3])
def test_with_draws_value_and_gradient_of_forward_kl_are_unbiased(samples):
    """Averaged over every draw, weighted by its probability: the dense loss, exactly."""
    s, t = logits(0), logits(1)
    tail_size = V - K
    signal = top(t)
    log_p = t.log_softmax(-1)
    rest = log_p.scatter(-1, signal.token_ids, -torch.inf)
    p_tail = (rest - signal.log_residual.unsqueeze(-1)).exp()
    tails = [[j for j in range(V) if j not in row] for row in signal.token_ids.tolist()]
    value, gradient = torch.zeros(ROWS, dtype=torch.float64), torch.zeros_like(s)
    for places in itertools.product(range(tail_size), repeat=samples):
        ids = torch.tensor([[tails[row][p] for p in places] for row in range(ROWS)])
        weight = p_tail.gather(-1, ids).prod(-1)
        free = s.clone().requires_grad_()
        loss = top_k_divergence(free, replace(signal, tail_ids=ids), divergence=forward_kl)
        gradient += weight.unsqueeze(-1) * torch.autograd.grad(loss.sum(), free)[0]
        value += weight * loss.detach()
    P, Q = t.softmax(-1), s.softmax(-1)
    torch.testing.assert_close(value, (P * (P / Q).log()).sum(-1))
    torch.testing.assert_close(gradient, Q - P)


def test_draws_come_from_the_tail_alone_and_follow_it():
    t = logits(1)
    signal = top(t, samples=20_000)
    assert not (signal.tail_ids.unsqueeze(-1) == signal.token_ids.unsqueeze(1)).any()
    for row in range(ROWS):
        counts = torch.bincount(signal.tail_ids[row], minlength=V) / 20_000
        p = t[row].softmax(-1).masked_fill(counts == 0, 0)
        torch.testing.assert_close(counts.double(), p / p.sum(), rtol=0, atol=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", [n for n in DIVERGENCES if n != "total_variation"])
def test_draws_leave_the_minimum_at_the_teacher(name, temperature):
    """At Q = P the gradient is that of the draws alone, whose mean is 0."""
    t = logits(1)
    options = {"temperature": temperature}
    mean = sum(
        value_and_gradient(t, top(t, samples=64, seed=seed), DIVERGENCES[name], **options)[1]
        for seed in range(200)
    )
    one = value_and_gradient(t, top(t, samples=64), DIVERGENCES[name], **options)[1]
    assert one.abs().max() > 1e-4
    assert (mean / 200).norm() < 0.2 * one.norm()
