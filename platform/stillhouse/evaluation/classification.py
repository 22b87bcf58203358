"""Scores of what is said of texts: classes, numbers, several labels. Pure functions, in float64.

A score that is not defined, because one side never varies, is 0: it shows no relation.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor


def scores(logits: Float[Tensor, "B C"], labels: Num[Tensor, "B *C"]) -> Mapping[str, float]:
    """Return the scores of a task, its main one first; the labels say what kind it is.

    Args:
        logits: of a head, for every text.
        labels: as in `EncoderBatch`.

    Returns:
        Of classes `accuracy`, `f1` (of class 1 where there are two, as GLUE has it, else the mean
        over classes) and `matthews`; of a regression `pearson`, `spearman` and `mse`; of several
        labels `f1` (of all decisions together), `macro_f1` (the mean over labels) and
        `exact_match`, the share of texts all of whose labels are right.
    """
    if labels.ndim == 2:
        said, holds = logits > 0, labels > 0.5
        return {
            "f1": f1(said.flatten(), holds.flatten()),
            "macro_f1": macro_f1(said, holds),
            "exact_match": float((said == holds).all(-1).double().mean()),
        }
    if labels.is_floating_point():
        said = logits.squeeze(-1)
        return {
            "pearson": pearson(said, labels),
            "spearman": spearman(said, labels),
            "mse": float((said.double() - labels.double()).square().mean()),
        }
    classes, said = logits.shape[-1], logits.argmax(-1)
    by_class = torch.arange(classes, device=labels.device)
    said_of, holds = said[:, None] == by_class, labels[:, None] == by_class
    return {
        "accuracy": accuracy(said, labels),
        "f1": f1(said == 1, labels == 1) if classes == 2 else macro_f1(said_of, holds),
        "matthews": matthews(said, labels, classes),
    }


def main_score(logits: Float[Tensor, "B C"], labels: Num[Tensor, "B *C"]) -> tuple[str, float]:
    """Return name and value of a task's main score."""
    found = scores(logits, labels)
    name = main_of(found)
    return name, found[name]


def main_of(found: Mapping[str, float]) -> str:
    """Return the name of a task's main score: accuracy, Pearson's r, or F1 of several labels."""
    return next(iter(found))


def accuracy(said: Int[Tensor, "B"], labels: Int[Tensor, "B"]) -> float:
    """Return the share of texts whose class is right."""
    return float((said == labels).double().mean())


def f1(said: Bool[Tensor, "B"], holds: Bool[Tensor, "B"]) -> float:
    """Return 2 TP / (2 TP + FP + FN)."""
    both, either = (said & holds).sum(), said.sum() + holds.sum()
    return _ratio(2 * both.double(), either.double())


def macro_f1(said: Bool[Tensor, "B C"], holds: Bool[Tensor, "B C"]) -> float:
    """Return the mean of F1 over the columns."""
    values = [f1(s, h) for s, h in zip(said.unbind(-1), holds.unbind(-1), strict=True)]
    return sum(values) / len(values)


def matthews(said: Int[Tensor, "B"], labels: Int[Tensor, "B"], classes: int) -> float:
    """Return Matthews' correlation, of more than two classes Gorodkin's R_K.

    (c s - Σ p_k t_k) / sqrt((s² - Σ p_k²)(s² - Σ t_k²)): c right ones of s, class k said of p_k
    texts and true of t_k.
    """
    p = said.bincount(minlength=classes).double()
    t = labels.bincount(minlength=classes).double()
    c, s = (said == labels).double().sum(), len(labels)
    return _ratio(c * s - p @ t, ((s**2 - p @ p) * (s**2 - t @ t)).sqrt())


def pearson(x: Num[Tensor, "B"], y: Num[Tensor, "B"]) -> float:
    """Return Pearson's r."""
    x, y = (v.double() - v.double().mean() for v in (x, y))
    # A constant's mean is exact only up to rounding.
    if any((v == v[0]).all() for v in (x, y)):
        return 0.0
    return _ratio(x @ y, x.norm() * y.norm())


def spearman(x: Num[Tensor, "B"], y: Num[Tensor, "B"]) -> float:
    """Return Spearman's ρ: Pearson's r of the ranks, equal values sharing the mean of theirs."""
    return pearson(_ranks(x), _ranks(y))


def _ranks(values: Num[Tensor, "B"]) -> Float[Tensor, "B"]:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[place]


def _ratio(above: Tensor, below: Tensor) -> float:
    return float(above / below) if below > 0 else 0.0
