"""Scores of classes, numbers and several labels against libraries that others trust."""

import pytest
import torch
from scipy import stats
from torch import Tensor
from torchmetrics.functional import classification as trusted

from stillhouse.evaluation.classification import (
    accuracy,
    f1,
    main_score,
    matthews,
    pearson,
    scores,
    spearman,
)


def classes_and_logits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return uneven classes, and logits that know a little of them."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.tensor([5.0, 2.0, 1.0, 1.0])[:count]
    labels = weights.multinomial(60, replacement=True, generator=generator)
    noise = torch.randn(60, count, generator=generator)
    return labels, noise + torch.nn.functional.one_hot(labels, count)


@pytest.mark.parametrize("seed", range(3))
def test_two_classes(seed) -> None:
    labels, logits = classes_and_logits(2, seed)
    said = logits.argmax(-1)
    assert scores(logits, labels) == {
        "accuracy": pytest.approx(float(trusted.binary_accuracy(said, labels))),
        "f1": pytest.approx(float(trusted.binary_f1_score(said, labels))),
        "matthews": pytest.approx(float(trusted.binary_matthews_corrcoef(said, labels))),
    }


@pytest.mark.parametrize("count", [3, 4])
def test_several_classes(count) -> None:
    labels, logits = classes_and_logits(count, 7)
    expected = {
        "accuracy": trusted.multiclass_accuracy(logits, labels, count, average="micro"),
        "f1": trusted.multiclass_f1_score(logits, labels, count, average="macro"),
        "matthews": trusted.multiclass_matthews_corrcoef(logits, labels, count),
    }
    assert scores(logits, labels) == {n: pytest.approx(float(v)) for n, v in expected.items()}


def test_several_labels() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(50, 3, generator=generator) < 0.4).float()
    logits = torch.randn(50, 3, generator=generator) + 2 * labels - 1
    said = (logits > 0).int()
    expected = {
        "f1": trusted.multilabel_f1_score(said, labels.int(), 3, average="micro"),
        "macro_f1": trusted.multilabel_f1_score(said, labels.int(), 3, average="macro"),
        "exact_match": trusted.multilabel_exact_match(said, labels.int(), 3),
    }
    assert 0 < expected["exact_match"] < 1
    assert scores(logits, labels) == {n: pytest.approx(float(v)) for n, v in expected.items()}


@pytest.mark.parametrize("ties", [False, True])
def test_numbers(ties) -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randn(40, generator=generator)
    logits = (labels + torch.randn(40, generator=generator)).exp().unsqueeze(-1)
    if ties:
        labels, logits = labels.round(), logits.round()
        assert len(labels.unique()) < 10
    said = logits.squeeze(-1)
    found = scores(logits, labels)
    assert list(found) == ["pearson", "spearman", "mse"]
    assert found["pearson"] == pytest.approx(stats.pearsonr(said.double(), labels).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(said, labels).statistic)
    assert abs(found["pearson"] - found["spearman"]) > 0.005
    assert found["mse"] == pytest.approx(float((said - labels).square().mean()))


def test_the_main_score_is_the_first_of_its_kind() -> None:
    logits, numbers = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 2.0]]), torch.arange(3.0)
    assert main_score(logits, torch.tensor([1, 0, 0])) == ("accuracy", pytest.approx(2 / 3))
    assert main_score(numbers[:, None] * 2 + 1, numbers) == ("pearson", pytest.approx(1.0))
    assert main_score(logits, (logits > 0.5).float())[0] == "f1"


def test_what_never_varies_shows_no_relation() -> None:
    same, other = torch.full((5,), 0.1), torch.arange(5.0)
    assert pearson(same, other) == spearman(other, same) == 0.0
    assert matthews(torch.zeros(5, dtype=torch.long), torch.arange(5) % 2, 2) == 0.0
    assert f1(torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.bool)) == 0.0
    assert accuracy(torch.tensor([1, 1]), torch.tensor([1, 0])) == 0.5
