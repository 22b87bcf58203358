"""Sequence-level knowledge distillation.

Yoon Kim and Alexander M. Rush, "Sequence-Level Knowledge Distillation", arXiv:1606.07947, Sec. 3.2.

The student is drawn to the teacher's distribution over whole sequences, which is replaced by its
mode, found by beam search and written down before training:

    L = -Σ_y p(y|x) log q(y|x)  ≈  -log q(ŷ|x),   ŷ ≈ argmax_y p(y|x)

The sequences ŷ are the batch (stage `generate`, `data.corpora.generated`), the prompts x are
masked, and no teacher is asked. With `decoding=nearest_in_beam` ŷ is the beam's entry nearest to
the data (Sec. 3.3, Seq-Inter); with `decoding=sampled` the sum is estimated by a draw, without the
mode's bias. The paper's combination with the word-level loss is `method=word_kd` on the same
sequences with a teacher.
"""

from stillhouse.objectives.tokens import token_cross_entropy
from stillhouse.records.language import LanguageOutput, LanguageSignal, SequenceBatch
from stillhouse.records.losses import LossTerms


def sequence_kd(
    student: LanguageOutput, signal: LanguageSignal | None, batch: SequenceBatch
) -> LossTerms:
    """Return -log q(ŷ|x), a mean over the generated tokens; `signal` is not read."""
    nll = token_cross_entropy(student, batch.labels, batch.mask)
    return LossTerms(total=nll, terms={"sequence_nll": nll.detach()})
