"""Fine-tuning on labels alone, without a teacher.

L = L_hard: the cross-entropy of the class, the squared error of a regression, or the cross-entropy
of several labels (`objectives.labels`), a mean over texts. It trains the teacher of a task, and it
is the baseline `finetuned` that every distillation must beat.
"""

from stillhouse.objectives.labels import hard_label_loss
from stillhouse.records.encoders import EncoderBatch, EncoderOutput
from stillhouse.records.losses import LossTerms


def finetune(
    student: EncoderOutput, signal: EncoderOutput | None, batch: EncoderBatch
) -> LossTerms:
    """Return L_hard, a mean over the texts; `signal` is not read."""
    hard = hard_label_loss(student, batch)
    return LossTerms(total=hard, terms={"hard_labels": hard.detach()})
