"""The generalised JSD against TRL's function, live where TRL is installed, else its numbers."""

import pytest
import torch

from stillhouse.objectives.divergences import named_divergence
from stillhouse.objectives.tokens import token_divergence
from stillhouse.records.language import LanguageOutput, VocabularyHead

B, T, V = 3, 5, 11
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
TEMPERATURES = (1.0, 2.5)
LENGTHS = torch.tensor([5, 2, 4])
MASK = torch.arange(T) < LENGTHS.unsqueeze(1)
# `GKDTrainer.generalized_jsd_loss` of TRL 1.16.0 on the logits of `waves`, in float64, labels -100
# where MASK is False: (beta, temperature) -> loss.
GOLDEN = {
    (0.0, 1.0): 2.593238305053112,
    (0.0, 2.5): 0.6719700706322046,
    (0.1, 1.0): 0.1838890906807899,
    (0.1, 2.5): 0.05804852098445852,
    (0.5, 1.0): 0.4347374107683622,
    (0.5, 2.5): 0.15253760308403927,
    (0.9, 1.0): 0.18974270327616843,
    (0.9, 2.5): 0.05831137707973997,
    (1.0, 1.0): 2.7216558449656545,
    (1.0, 2.5): 0.6751554913551016,
}


def waves(phase: float) -> torch.Tensor:
    """Logits [B, T, V] that need no random generator."""
    n = torch.arange(B * T * V, dtype=torch.float64).reshape(B, T, V)
    return 3 * torch.sin(1.7 * n + phase) + torch.cos(0.3 * n * phase)


def ours(student, teacher, beta: float, temperature: float) -> float:
    eye = VocabularyHead(torch.eye(V, dtype=torch.float64))
    loss = token_divergence(
        LanguageOutput(student, eye),
        LanguageOutput(teacher, eye),
        MASK,
        divergence=named_divergence("jsd", beta=beta, alpha=0.1),
        temperature=temperature,
    )
    return float(loss)


def trl_s(student, teacher, beta: float, temperature: float) -> float:
    from trl.experimental.gkd import GKDTrainer

    labels = torch.zeros(B, T, dtype=torch.long).masked_fill(~MASK, -100)
    loss = GKDTrainer.generalized_jsd_loss(
        student, teacher, labels=labels, beta=beta, temperature=temperature
    )
    return float(loss)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_values_equal_those_that_trl_gave(beta, temperature):
    found = ours(waves(0.4), waves(2.0), beta, temperature)
    assert found == pytest.approx(GOLDEN[beta, temperature], rel=1e-12)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("beta", BETAS)
def test_values_equal_trl_s_on_random_logits(beta, temperature, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    pytest.importorskip("trl")
    generator = torch.Generator().manual_seed(0)
    pair = 2 * torch.randn(2, B, T, V, generator=generator, dtype=torch.float64)
    expected = trl_s(pair[0], pair[1], beta, temperature)
    assert ours(pair[0], pair[1], beta, temperature) == pytest.approx(expected, rel=1e-10)
