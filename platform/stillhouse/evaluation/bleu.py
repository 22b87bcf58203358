"""BLEU of one sentence, smoothed: how near a candidate is to a reference."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence

LONGEST = 4


def sentence_bleu(candidate: Sequence[Hashable], reference: Sequence[Hashable]) -> float:
    """Return BLEU+1 in [0, 1]: n-grams up to 4, counts of n >= 2 smoothed by one.

    Chin-Yew Lin and Franz Josef Och, "ORANGE: a Method for Evaluating Automatic Evaluation Metrics
    for Machine Translation", COLING 2004; brevity penalty as in Papineni et al., ACL 2002.
    """
    if not candidate or not reference:
        return 0.0
    log_precision = 0.0
    for n in range(1, LONGEST + 1):
        ours, theirs = _ngrams(candidate, n), _ngrams(reference, n)
        matches = sum((ours & theirs).values())
        total = max(0, len(candidate) - n + 1)
        if n == 1 and matches == 0:
            return 0.0
        smoothing = 0 if n == 1 else 1
        log_precision += math.log((matches + smoothing) / (total + smoothing)) / LONGEST
    brevity = min(0.0, 1 - len(reference) / len(candidate))
    return math.exp(brevity + log_precision)


def _ngrams(tokens: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
