"""Chains against their own matrices, and the rule that no classifier can beat."""

from collections import Counter

import numpy as np
import pytest

from stillhouse.data.labelled.markov import markov_chains, markov_text, transitions, word
from stillhouse.data.tasks.exercises import split_of
from stillhouse.errors import UserError

SHAPE = {"chains": 4, "symbols": 12, "successors": 3, "noise": 0.4, "seed": 5}
SIZES = {"train_examples": 400, "validation_examples": 50, "test_examples": 100}
LINES = {"length": 24, **SHAPE, **SIZES}
SYMBOLS = {word(symbol): symbol for symbol in range(12)}


def numbers(text):
    return [SYMBOLS[w] for w in text.split()]


def counts(texts):
    """Return how often a symbol follows another."""
    found = np.zeros((12, 12))
    for text in texts:
        symbols = numbers(text)
        np.add.at(found, (symbols[:-1], symbols[1:]), 1)
    return found


def test_every_chain_uses_each_symbol_equally_often():
    matrices = transitions(**SHAPE)
    assert matrices.min() >= 0.4 / 12
    np.testing.assert_allclose(matrices.sum(-1), 1)
    np.testing.assert_allclose(matrices.sum(-2), 1)
    uniform = np.full(12, 1 / 12)
    np.testing.assert_allclose(uniform @ matrices, np.tile(uniform, (4, 1)))
    assert len({m.tobytes() for m in matrices}) == 4


def test_a_text_follows_the_matrix_of_its_chain():
    made = markov_chains(**(LINES | {"train_examples": 1200}))
    for chain, matrix in enumerate(transitions(**SHAPE)[:2]):
        found = counts(e.text for e in made.splits["train"] if e.label == chain)
        steps = found.sum(-1, keepdims=True)
        error = np.sqrt(matrix * (1 - matrix) / steps)
        assert np.abs((found / steps - matrix) / error).max() < 4.5
        np.testing.assert_allclose(found.sum(-1) / found.sum(), 1 / 12, atol=0.01)


def test_the_general_text_is_a_mixture_of_all_chains():
    corpus = markov_text(**(LINES | {"train_examples": 2000}))
    matrix = transitions(**SHAPE).mean(0)
    found = counts(corpus.documents("train"))
    np.testing.assert_allclose(found / found.sum(-1, keepdims=True), matrix, atol=0.03)


def test_symbols_alone_tell_nothing_and_their_order_nearly_all():
    """The likelihood ratio is the best rule there is; counts of symbols are as good as a coin."""
    made = markov_chains(**(LINES | {"test_examples": 400, "train_examples": 2000}))
    first, second = np.log(transitions(**SHAPE)[:2])
    test = made.splits["test"]
    labels = np.array([e.label for e in test])
    ratios = [(counts([e.text]) * (second - first)).sum() for e in test]
    assert ((np.array(ratios) > 0) == labels).mean() > 0.98

    def histograms(examples):
        return np.stack([np.bincount(numbers(e.text), minlength=12) for e in examples])

    train = made.splits["train"]
    targets = np.array([e.label for e in train]) - 0.5
    weights = np.linalg.lstsq(histograms(train) - 2.0, targets, rcond=None)[0]
    guessed = ((histograms(test) - 2.0) @ weights > 0) == labels
    assert abs(guessed.mean() - 0.5) < 0.1


def test_splits_are_full_balanced_and_share_no_text():
    made, corpus = markov_chains(**LINES), markov_text(**LINES)
    for split, size in (("train", 400), ("validation", 50), ("test", 100)):
        examples = made.splits[split]
        assert Counter(e.label for e in examples) == {0: size // 2, 1: size // 2}
        assert len(corpus.documents(split)) == size
    texts = [e.text for part in made.splits.values() for e in part]
    general = [d for part in corpus.splits.values() for d in part]
    assert len(set(texts + general)) == len(texts) + len(general)
    assert all(len(text.split()) == 24 for text in texts)


def test_the_seed_decides_everything():
    assert markov_chains(**LINES) == markov_chains(**LINES)
    assert markov_chains(**LINES).splits != markov_chains(**(LINES | {"seed": 6})).splits


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"chains": 1}, "chains=1: expected 2 or more, for the task tells two apart"),
        ({"symbols": 65}, "symbols=65: expected 1 to 64"),
        ({"successors": 0}, "successors=0: expected 1 or more"),
        ({"noise": 1.5}, "noise=1.5: expected a share, 0 to 1"),
        ({"length": 1}, "length=1: expected 2 symbols or more"),
        ({"test_examples": 0}, "test_examples=0: expected 1 or more"),
    ],
)
def test_sizes_that_cannot_be(changes, words):
    with pytest.raises(UserError) as refused:
        markov_chains(**(LINES | changes))
    assert str(refused.value) == f"data.corpus.{words}"


def test_more_texts_than_there_are():
    pairs = [split_of(f"{word(a)} {word(b)}") for a in range(12) for b in range(12)]
    with pytest.raises(UserError) as refused:
        markov_chains(**(LINES | {"length": 2}))
    assert str(refused.value) == (
        f"data.corpus.train_examples=400: only {pairs.count('train')} different texts were found "
        "for train; expected at most as many, or longer texts"
    )
