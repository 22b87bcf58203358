"""The loss against plain torch, by the checks of its derivation."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import peak_bytes
from torch import Tensor
from vocabulary_heads import (
    DIVERGENCES,
    Problem,
    assert_same,
    loss_of,
    problem,
    some,
    top_k,
)

from stillhouse.objectives.divergences import named_divergence
from stillhouse.objectives.top_k import top_k_divergence
from stillhouse.records.language import TopKSignal, VocabularyHead
from stillhouse_kernels.vocabulary_loss import linear_divergence

OPTIONS = {
    "plain": {},
    "tempered": {"temperature": 2.0, "scale_by_temperature_squared": True},
    "capped": {"logit_softcap": 3.0, "temperature": 2.0},
    "a pair": {"logit_softcap": (3.0, None), "logit_scale": (0.5, 2.0)},
    "weighted": {"beta": 0.3, "alpha": 0.4, "temperature": 0.7},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_matches_the_plain_form(divergence: str, options: dict[str, Any]) -> None:
    p = problem()
    mask = some(13)
    expected = p(divergence=divergence, mask=mask, backend="reference", **options)
    for chunk in (1, 7, 9, 12):
        assert_same(p(divergence=divergence, mask=mask, chunk_size=chunk, **options), expected)


@pytest.mark.parametrize("drawn", [0, 5])
@pytest.mark.parametrize("k", [1, 4, 63])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_matches_the_plain_form(divergence: str, k: int, drawn: int) -> None:
    p = problem()
    teacher = top_k(p, k, drawn if k < 63 else 0)
    for options in OPTIONS.values():
        keywords = {"divergence": divergence, "mask": some(13), "teacher_topk": teacher, **options}
        assert_same(p(chunk_size=4, **keywords), p(backend="reference", **keywords))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("beta", "alpha"), [(0.5, 0.1), (0.0, 0.0), (1.0, 0.7)])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_conventions_are_the_platforms(
    divergence: str, beta: float, alpha: float, temperature: float
) -> None:
    p = problem()
    measure = named_divergence(divergence, beta=beta, alpha=alpha)
    keywords: dict[str, Any] = {"divergence": divergence, "temperature": temperature}
    keywords |= {"beta": beta, "alpha": alpha, "logit_softcap": 4.0, "logit_scale": (0.5, 1.5)}
    s = VocabularyHead(p.W, p.b, logit_scale=0.5, logit_softcap=4.0)(p.X)
    t = VocabularyHead(p.U, p.c, logit_scale=1.5, logit_softcap=4.0)(p.Y)
    logs = ((x / temperature).log_softmax(-1) for x in (s, t))
    torch.testing.assert_close(p(**keywords)[0], measure(*logs).mean())
    teacher = top_k(p, 5, drawn=3)
    assert teacher.tail_ids is not None
    assert teacher.tail_entropy is not None
    signal = TopKSignal(
        token_ids=teacher.ids,
        log_probs=teacher.log_probs,
        log_residual=teacher.log_residual,
        tail_ids=teacher.tail_ids,
        tail_entropy=teacher.tail_entropy,
        vocabulary_size=63,
    )
    expected = top_k_divergence(s, signal, divergence=measure, temperature=temperature).mean()
    torch.testing.assert_close(p(teacher_topk=teacher, **keywords)[0], expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_neither_chunk_nor_order_matters(divergence: str) -> None:
    p = problem(n=31)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(2))
    q = replace(p, X=p.X[order], Y=p.Y[order])
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        whole = p.to(dtype)(divergence=divergence)
        assert_same(p.to(dtype)(divergence=divergence, chunk_size=4), whole, tolerance)
        loss, dX, dW, db = q.to(dtype)(divergence=divergence, chunk_size=9)
        assert_same([loss, dX[order.argsort()], dW, db], whole, tolerance)


def test_certain_teacher_is_cross_entropy() -> None:
    p = problem()
    labels = torch.arange(13) * 4
    X, W, b = (x.requires_grad_() for x in (p.X, p.W, p.b))
    loss = F.cross_entropy(F.linear(X, W, b), labels)
    expected = [loss.detach(), *torch.autograd.grad(loss, (X, W, b))]
    hard = replace(p, Y=1e4 * torch.eye(13).double(), U=F.one_hot(labels, 63).double().t())
    assert_same(replace(hard, c=torch.zeros(63).double())(), expected)
    teacher = (labels[:, None], torch.zeros(13, 1), torch.full((13,), -torch.inf))
    assert_same(p(teacher_topk=teacher), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_are_at_rest(divergence: str) -> None:
    p = problem()
    p = replace(p, Y=p.X, U=p.W, c=p.b)
    for x in p(divergence=divergence, temperature=2.0):
        assert x.abs().max() < 1e-14
    if divergence == "total_variation":
        return  # the teacher's stored probabilities tie only up to rounding
    for x in p(divergence=divergence, teacher_topk=top_k(p, 4)):
        assert x.abs().max() < 1e-14


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradient_rows_sum_to_zero(divergence: str) -> None:
    p = problem(V=20, H=20)
    p = replace(p, W=torch.eye(20).double())  # dX is then G / n
    for teacher in (None, top_k(p, 4, 3)):
        _, G, _, _ = p(divergence=divergence, teacher_topk=teacher)
        assert G.sum(-1).abs().max() < 1e-15
        assert G.abs().max() > 1e-3


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher", ["dense", "top-k"])
def test_ignored_rows_are_never_read(divergence: str, teacher: str) -> None:
    p, mask = problem(), some(13)
    signal = top_k(p, 4) if teacher == "top-k" else None
    expected = p(divergence=divergence, mask=mask, teacher_topk=signal, chunk_size=4)
    bad = torch.tensor([[torch.nan], [torch.inf]]).double()[torch.arange(4) % 2]
    p = Problem(*(x.clone() for x in vars(p).values()))
    p.X[~mask], p.Y[~mask] = bad, -bad
    if signal is not None:
        signal = signal._replace(ids=signal.ids.clone(), log_probs=signal.log_probs.clone())
        signal.ids[~mask], signal.log_probs[~mask] = -100, torch.nan
    got = p(divergence=divergence, mask=mask, teacher_topk=signal, chunk_size=4)
    assert all(map(torch.equal, got, expected))
    assert not got[1][~mask].any()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_constant_shift_changes_nothing(divergence: str) -> None:
    p = problem()
    expected = p(divergence=divergence, temperature=2.0)
    assert_same(replace(p, b=p.b + 7.0)(divergence=divergence, temperature=2.0), expected)
    assert_same(replace(p, c=p.c - 9.0)(divergence=divergence, temperature=2.0), expected)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("teacher", ["dense", "top-k"])
def test_large_logits_stay_finite(divergence: str, teacher: str) -> None:
    p = problem(V=1000)
    p.b[::2], p.b[1::2], p.c[::3] = 300.0, -300.0, -300.0
    options = {
        "divergence": divergence,
        "teacher_topk": top_k(p, 9, 2) if teacher == "top-k" else None,
    }
    expected = p(backend="reference", **options)
    got = p.to(torch.float32)(**options)
    assert all(x.isfinite().all() for x in got)
    assert_same(got, expected, 1e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_impossible_symbols_contribute_nothing(divergence: str) -> None:
    p = problem()
    p.c[::5] = -torch.inf
    if divergence in ("reverse_kl", "skew_reverse_kl"):
        assert math.isinf(replace(p)(divergence="reverse_kl")[0])
        p.b[::5] = -torch.inf
    got = p(divergence=divergence, chunk_size=4)
    assert all(x.isfinite().all() for x in got)
    assert_same(got, p(divergence=divergence, backend="reference"))
    p.b[::10] = -torch.inf
    assert_same(p(divergence=divergence), p(divergence=divergence, backend="reference"))


@pytest.mark.parametrize("backend", ["streaming", "reference"])
def test_nothing_counts(backend: str) -> None:
    p = problem()
    for x in p(mask=torch.zeros(13, dtype=torch.bool), backend=backend):
        assert not x.any()
    empty = replace(p, X=p.X[:0], Y=p.Y[:0])
    assert [x.abs().sum().item() for x in empty(backend=backend)] == [0.0] * 4


def test_incoming_gradient_scales_and_halves_add_up() -> None:
    p, mask = problem(), some(13)
    loss, *whole = p(mask=mask)
    _, *threefold = p(mask=mask, loss_scale=3.0)
    assert_same([loss, *threefold], [loss, *(3 * x for x in whole)])
    parts = []
    for rows in (slice(0, 6), slice(6, 13)):
        half = replace(p, X=p.X[rows], Y=p.Y[rows])
        share = mask[rows].sum().item() / mask.sum().item()
        value, *gradients = half(mask=mask[rows], loss_scale=share)
        parts.append([share * value, *gradients])
    first, second = parts
    dX = torch.cat([first[1], second[1]])
    summed = [first[i] + second[i] for i in (0, 2, 3)]
    assert_same([summed[0], dX, *summed[1:]], [loss, *whole])


@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_memory_is_a_chunks(divergence: str) -> None:
    V, H, c = 3000, 16, 32
    peaks = []
    for n in (128, 512):
        p = problem(n, V, H, H).to(torch.float32)
        p = Problem(*(x.requires_grad_(name in "XW") for name, x in vars(p).items()))
        options = {"divergence": divergence, "chunk_size": c}
        run = partial(linear_divergence, p.X, p.W, p.Y, p.U, **options)
        run()
        outputs = 4 * (V * H + n * H + n)
        peaks.append(peak_bytes(run) - outputs)
    # Two models' logits; three blocks and a product of the row functions, here a chunk's size.
    assert max(peaks) < 6.2 * c * V * 4
    assert peaks[1] - peaks[0] < 8 * 512 * H
    with torch.no_grad():
        assert peak_bytes(run) < 6.2 * c * V * 4


def test_frozen_head_has_no_gradient_buffer() -> None:
    p = problem(64, 1000, 64, 16).to(torch.float32)
    both, frozen = (lambda r=r: loss_of(p, r, chunk_size=8) for r in ("XW", "X"))
    both(), frozen()
    assert peak_bytes(both) - peak_bytes(frozen) > 0.9 * 4 * 1000 * 64
    X = p.X.requires_grad_()
    (dX,) = torch.autograd.grad(linear_divergence(X, p.W, p.Y, p.U), X)
    torch.testing.assert_close(dX, replace(p, b=0 * p.b, c=0 * p.c)()[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_token_kept_is_the_dense_form(divergence: str) -> None:
    p = problem()
    for temperature in (1.0, 2.0):
        options = {"divergence": divergence, "temperature": temperature}
        assert_same(p(teacher_topk=top_k(p, 63), **options), p(**options))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck(divergence: str) -> None:
    p = problem(n=3, V=7, H=3, Ht=2)
    teacher = top_k(p, 2, 2)
    arguments = [x.requires_grad_() for x in (p.X, p.W, p.b)]
    options: dict[str, Any] = {"divergence": divergence, "temperature": 1.5, "logit_softcap": 3.0}

    def dense(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return linear_divergence(X, W, p.Y, p.U, student_bias=b, **options)

    def kept(X: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return linear_divergence(X, W, None, None, student_bias=b, teacher_topk=teacher, **options)

    assert torch.autograd.gradcheck(dense, arguments)
    assert torch.autograd.gradcheck(kept, arguments)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, m) for m in (9, 40, 5, 5))),
    divergence=st.sampled_from(DIVERGENCES),
    chunk=st.integers(1, 12),
    k=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_any_shape(
    shape: tuple[int, int, int, int], divergence: str, chunk: int, k: int, seed: int
) -> None:
    p = problem(*shape, seed=seed)
    teacher = top_k(p, min(k, shape[1])) if k else None
    mask = torch.rand(shape[0], generator=torch.Generator().manual_seed(seed)) < 0.7
    options = {"divergence": divergence, "teacher_topk": teacher, "mask": mask}
    got, expected = p(chunk_size=chunk, **options), p(backend="reference", **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("V", [1, 63, 1000])
@pytest.mark.parametrize("n", [1, 63])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_awkward_sizes_views_and_poisoned_memory(divergence: str, n: int, V: int) -> None:
    p = problem(n, V, 5, 3).to(torch.float32)
    expected = p(divergence=divergence, backend="reference")
    storage = {name: torch.full((2, *x.t().shape), torch.nan) for name, x in vars(p).items()}
    views = Problem(*(storage[name][1].copy_(x.t()).t() for name, x in vars(p).items()))
    # Deterministic mode fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True)
    try:
        got = views(divergence=divergence, chunk_size=17)
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


ACCURACY = {torch.float32: (2e-6, 2e-5), torch.float16: (1e-3,) * 2, torch.bfloat16: (1e-2,) * 2}


@pytest.mark.parametrize("dtype", ACCURACY.keys(), ids=str)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_accuracy(divergence: str, dtype: torch.dtype) -> None:
    p = problem(100, 3000, 64, 32)
    p = replace(p, W=p.W / 8, U=p.U / 6).to(dtype)
    for teacher in (None, top_k(p.to(torch.float64), 8, 4)):
        options = {"divergence": divergence, "mask": some(100), "teacher_topk": teacher}
        exact = p.to(torch.float64)(backend="reference", **options)
        loss, *gradients = p(chunk_size=24, **options)
        values, slopes = ACCURACY[dtype]
        assert_same([loss] * 4, [exact[0]] * 4, values)
        assert_same([exact[0], *gradients], exact, slopes)
        assert [x.dtype for x in gradients] == [dtype] * 3
        assert loss.dtype == torch.float32


def test_float16_gradients_do_not_underflow() -> None:
    p = replace(problem(64, 1000), W=problem(64, 1000).W / 3000).to(torch.float16)
    _, *exact = p.to(torch.float64)(loss_scale=2.0**16)
    _, *scaled = p(loss_scale=2.0**16)
    assert_same([exact[0], *scaled], [exact[0], *exact], 2e-3)


def test_many_chunks_add_up_in_float32() -> None:
    p = problem(256, 63).to(torch.bfloat16)
    assert_same(p(chunk_size=1), p(chunk_size=256), 1e-3)


@pytest.mark.parametrize(
    ("divergence", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)]
)
def test_other_libraries_agree(divergence: str, beta: float) -> None:
    trainer = pytest.importorskip("trl.trainer.distillation_trainer")
    p = replace(problem(40, 300), b=torch.zeros(300), c=torch.zeros(300)).to(torch.float32)
    X, W = p.X.detach().requires_grad_(), p.W.detach().requires_grad_()
    mask = some(40)
    loss = trainer._chunked_divergence_loss(X[None], p.Y[None], W, p.U, mask[None], beta)[0]
    other = [loss.detach(), *torch.autograd.grad(loss, (X, W))]
    ours = p(divergence=divergence, beta=beta, mask=mask)[:3]
    for a, b in zip(ours, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
