"""The losses without logits equal those with them, in value and in every gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.objectives.divergences import forward_kl, named_divergence
from stillhouse.objectives.tokens import token_cross_entropy, token_divergence
from stillhouse.records.language import LanguageOutput, TopKSignal, VocabularyHead

MASK = torch.tensor([[True, True, False, True], [True, False, False, True]])
NAMES = (
    "forward_kl",
    "reverse_kl",
    "jsd",
    "skew_forward_kl",
    "skew_reverse_kl",
    "total_variation",
)
BACKENDS = ("reference", "streaming")


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def speaks(V: int, D: int, seed: int, **options) -> LanguageOutput:
    """A model's output with a head of its own, biased where `bias` is wanted."""
    bias = draw(V, seed=seed + 2) if options.pop("bias", False) else None
    head = VocabularyHead(draw(V, D, seed=seed), bias, **options)
    return LanguageOutput(draw(2, 4, D, seed=seed + 1), head)


def value_and_gradients(output: LanguageOutput, backend: str | None, loss) -> list[Tensor]:
    hidden, weight = output.hidden_states.clone(), output.head.weight.clone()
    bias = None if output.head.bias is None else output.head.bias.clone().requires_grad_()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), *([] if bias is None else [bias])]
    head = replace(output.head, weight=weight, bias=bias)
    value = loss(LanguageOutput(hidden, head, loss_backend=backend))
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def assert_equal_to_that_of_logits(output: LanguageOutput, backend: str, loss) -> None:
    expected = value_and_gradients(output, None, loss)
    ours = value_and_gradients(output, backend, loss)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_live_signal(name: str, backend: str) -> None:
    """Heads of their own, and the teacher's vocabulary padded."""
    student = speaks(11, 3, seed=0, bias=True, logit_softcap=4.0)
    teacher = speaks(13, 5, seed=10, logit_scale=0.5)
    measure = named_divergence(name, beta=0.3, alpha=0.2)
    assert_equal_to_that_of_logits(
        student,
        backend,
        lambda out: token_divergence(out, teacher, MASK, divergence=measure, temperature=1.5),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("draws", [0, 3])
def test_a_cached_signal(name: str, draws: int, backend: str) -> None:
    V, k = 11, 4
    log_p = draw(2, 4, V, seed=3, scale=2.0).log_softmax(-1)
    top = log_p.topk(k)
    tail = log_p.scatter(-1, top.indices, -torch.inf)
    shape = tail.log_softmax(-1)
    signal = TopKSignal(
        token_ids=top.indices,
        log_probs=top.values,
        log_residual=tail.logsumexp(-1),
        tail_ids=shape.topk(draws).indices,
        tail_entropy=-(shape.exp() * shape.nan_to_num(neginf=0)).sum(-1),
        vocabulary_size=V,
    )
    measure = named_divergence(name, beta=0.3, alpha=0.2)
    for width in (V, V + 2):
        student = speaks(width, 3, seed=0)
        assert_equal_to_that_of_logits(
            student,
            backend,
            lambda out: token_divergence(out, signal, MASK, divergence=measure, temperature=2.0),
        )


@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy(backend: str) -> None:
    labels = torch.arange(8).reshape(2, 4)
    student = speaks(11, 3, seed=0, bias=True, logit_scale=0.7)
    assert_equal_to_that_of_logits(
        student, backend, lambda out: token_cross_entropy(out, labels, MASK)
    )


def test_no_token_at_all() -> None:
    student = speaks(11, 3, seed=0)
    none = torch.zeros_like(MASK)
    labels = torch.zeros_like(none, dtype=torch.long)
    ours = value_and_gradients(
        student, "streaming", lambda out: token_cross_entropy(out, labels, none)
    )
    assert all(not tensor.any() for tensor in ours)


def test_logits_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(head: VocabularyHead, hidden_states: Tensor) -> Tensor:
        raise AssertionError("the head was applied")

    monkeypatch.setattr(VocabularyHead, "__call__", refuse)
    student = replace(speaks(11, 3, seed=0), loss_backend="streaming")
    measure = named_divergence("jsd", beta=0.5, alpha=0.1)
    token_divergence(student, speaks(11, 3, seed=5), MASK, divergence=measure)
    token_cross_entropy(student, torch.zeros_like(MASK, dtype=torch.long), MASK)


def test_a_divergence_without_a_name_is_refused() -> None:
    student = replace(speaks(11, 3, seed=0), loss_backend="streaming")
    with pytest.raises(UserError) as refusal:
        token_divergence(student, student, MASK, divergence=forward_kl)
    assert str(refusal.value) == (
        "stages.<stage>.family.loss_backend=streaming: this method's divergence is none of "
        "objectives.divergences; set it to null"
    )


def test_a_cached_signal_over_more_tokens_is_refused() -> None:
    rows = torch.zeros(2, 4, 1)
    signal = TopKSignal(rows.long(), rows, rows[..., 0], rows.long()[..., :0], rows[..., 0], 13)
    student = replace(speaks(11, 3, seed=0), loss_backend="streaming")
    measure = named_divergence("jsd", beta=0.5, alpha=0.1)
    with pytest.raises(UserError) as refusal:
        token_divergence(student, signal, MASK, divergence=measure)
    assert str(refusal.value) == (
        "stages.<stage>.family.loss_backend=streaming: the cached signal is over 13 tokens, the "
        "student knows 11; set it to null"
    )


def test_a_backend_that_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    student = replace(speaks(11, 3, seed=0), loss_backend="triton")
    student = replace(student, hidden_states=student.hidden_states.float())
    student = replace(student, head=VocabularyHead(student.head.weight.float()))
    with pytest.raises(UserError) as refusal:
        token_cross_entropy(student, torch.zeros_like(MASK, dtype=torch.long), MASK)
    assert str(refusal.value) == (
        "stages.<stage>.family.loss_backend: backend='triton': the tensors lie on cpu, the kernel "
        "runs on CUDA devices; backend='streaming' runs here (TRITON_INTERPRET=1, set before "
        "Python starts, runs the kernel in Triton's interpreter)"
    )
