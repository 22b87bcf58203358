"""Text of small Markov chains, where the right answers are known.

Every chain mixes a few random permutations of the symbols, and a little of any symbol:

    P = (1 - noise) sum_k w_k Pi_k + noise / S        S symbols, w uniform on the simplex

P is doubly stochastic, so that every chain uses each symbol equally often: which chain has written
a text is seen in the order of its symbols alone. The general corpus is a mixture of all chains; the
task is to tell two of them. A symbol is a word, a text a line of words.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
from jaxtyping import Float

from stillhouse.data.corpora.corpus import Corpus, Split
from stillhouse.data.labelled.task import Example, LabelledText, Task
from stillhouse.data.tasks.exercises import split_of
from stillhouse.errors import UserError
from stillhouse.ranges import Count

KEY = "data.corpus"
LICENCE = "public domain"
SYLLABLES = ("ba", "de", "fi", "go", "ku", "la", "me", "ni")
GENERAL, LABELLED = 0, 1
TEXTS_PER_EXAMPLE = 40

Transitions = Float[np.ndarray, "chains S S"]


def markov_text(
    *,
    chains: int,
    symbols: int,
    successors: int,
    noise: float,
    length: int,
    train_examples: Count,
    validation_examples: Count,
    test_examples: Count,
    seed: int,
) -> Corpus:
    """Make texts without labels, each of one chain of the mixture.

    Args:
        chains, symbols, successors, noise, seed: of the chains, as in `transitions`.
        length: symbols of a text.
        train_examples, validation_examples, test_examples: how many.

    Raises:
        UserError: for sizes that no chain and no text has.
    """
    matrices = transitions(chains, symbols, successors, noise, seed)
    sizes = _sizes(length, train_examples, validation_examples, test_examples)
    draws = np.random.default_rng((seed, GENERAL))
    made = _filled(_texts(matrices, range(chains), length, draws), sizes, chains)
    return Corpus(
        name=f"a mixture of {chains} Markov chains",
        licence=LICENCE,
        splits={split: [text for text, _ in part] for split, part in made.items()},
    )


def markov_chains(
    *,
    chains: int,
    symbols: int,
    successors: int,
    noise: float,
    length: int,
    train_examples: Count,
    validation_examples: Count,
    test_examples: Count,
    seed: int,
) -> LabelledText:
    """Make texts of the first two chains, each labelled with its own; half of them are of either.

    With the same seed and shape, the chains are those of `markov_text`; the texts are others.

    Args:
        chains, symbols, successors, noise, seed: of the chains, as in `transitions`.
        length: symbols of a text.
        train_examples, validation_examples, test_examples: how many.

    Raises:
        UserError: for sizes that no chain and no text has.
    """
    if chains < 2:
        raise UserError(f"{KEY}.chains={chains}: expected 2 or more, for the task tells two apart")
    matrices = transitions(chains, symbols, successors, noise, seed)
    sizes = _sizes(length, train_examples, validation_examples, test_examples)
    draws = np.random.default_rng((seed, LABELLED))
    made = _filled(_texts(matrices, range(2), length, draws), sizes, 2)
    return LabelledText(
        name="which of two Markov chains",
        licence=LICENCE,
        task=Task("classification", ("first chain", "second chain")),
        splits={s: [Example(t, None, chain) for t, chain in part] for s, part in made.items()},
    )


def transitions(chains: int, symbols: int, successors: int, noise: float, seed: int) -> Transitions:
    """Return the matrices; row i of one holds the probabilities of what follows symbol i.

    Args:
        chains: how many.
        symbols: S, the states of a chain.
        successors: permutations that a chain mixes.
        noise: share of steps that go to any symbol.
        seed: of the permutations and weights.

    Raises:
        UserError: for a size that no chain has.
    """
    most = len(SYLLABLES) ** 2
    for name, value, upper in (
        ("chains", chains, None),
        ("symbols", symbols, most),
        ("successors", successors, None),
    ):
        if value < 1 or (upper is not None and value > upper):
            expected = "1 or more" if upper is None else f"1 to {upper}"
            raise UserError(f"{KEY}.{name}={value}: expected {expected}")
    if not 0 <= noise <= 1:
        raise UserError(f"{KEY}.noise={noise}: expected a share, 0 to 1")
    draws = np.random.default_rng(seed)
    matrices = np.full((chains, symbols, symbols), noise / symbols)
    for matrix in matrices:
        for weight in draws.dirichlet(np.ones(successors)):
            matrix[np.arange(symbols), draws.permutation(symbols)] += (1 - noise) * weight
    return matrices


def word(symbol: int) -> str:
    """Return the word that a symbol is written as."""
    first, second = divmod(symbol, len(SYLLABLES))
    return SYLLABLES[first] + SYLLABLES[second]


def _sizes(length: int, train: int, validation: int, test: int) -> dict[Split, int]:
    if length < 2:
        raise UserError(f"{KEY}.length={length}: expected 2 symbols or more")
    sizes: dict[Split, int] = {"train": train, "validation": validation, "test": test}
    for split, size in sizes.items():
        if size < 1:
            raise UserError(f"{KEY}.{split}_examples={size}: expected 1 or more")
    return sizes


def _texts(
    matrices: Transitions, chosen: Sequence[int], length: int, draws: np.random.Generator
) -> Iterator[tuple[str, int]]:
    """Yield texts of the chosen chains in turn, with the number of the chain."""
    sums = matrices.cumsum(-1)
    while True:
        for chain in chosen:
            symbol = int(draws.integers(matrices.shape[-1]))
            words = [word(symbol)]
            for place in draws.random(length - 1):
                symbol = int(np.searchsorted(sums[chain, symbol], place, side="right"))
                # The last sum may fall short of 1 by a rounding.
                symbol = min(symbol, matrices.shape[-1] - 1)
                words.append(word(symbol))
            yield " ".join(words), chain


def _filled(
    texts: Iterator[tuple[str, int]], sizes: Mapping[Split, int], chains: int
) -> dict[Split, list[tuple[str, int]]]:
    """Take different texts until every split is full, of every chain as many."""
    found: dict[Split, list[tuple[str, int]]] = {split: [] for split in sizes}
    room = {(split, c): -(-size // chains) for split, size in sizes.items() for c in range(chains)}
    seen: set[str] = set()
    # A held-out split gets one text in ten.
    for text, chain in islice(texts, TEXTS_PER_EXAMPLE * max(sizes.values())):
        split = split_of(text)
        if text in seen or not room[split, chain] or len(found[split]) == sizes[split]:
            continue
        seen.add(text)
        room[split, chain] -= 1
        found[split].append((text, chain))
        if all(len(found[s]) == size for s, size in sizes.items()):
            break
    for split, size in sizes.items():
        if len(found[split]) < size:
            raise UserError(
                f"{KEY}.{split}_examples={size}: only {len(found[split])} different texts were "
                f"found for {split}; expected at most as many, or longer texts"
            )
    return found
