"""Supervised fine-tuning: the cross-entropy of the data alone, without a teacher.

L = -mean_t log q(y_t | y_<t), nats a token. It trains teachers, and it is the baseline
`student_alone` that every distillation must beat.
"""

from stillhouse.objectives.tokens import token_cross_entropy
from stillhouse.records.language import LanguageOutput, LanguageSignal, SequenceBatch
from stillhouse.records.losses import LossTerms


def sft(student: LanguageOutput, signal: LanguageSignal | None, batch: SequenceBatch) -> LossTerms:
    """Return the mean negative log-likelihood over the tokens that count; `signal` is not read."""
    cross_entropy = token_cross_entropy(student, batch.labels, batch.mask)
    return LossTerms(total=cross_entropy, terms={"cross_entropy": cross_entropy.detach()})
