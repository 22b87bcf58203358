"""Word-level knowledge distillation.

Yoon Kim and Alexander M. Rush, "Sequence-Level Knowledge Distillation", arXiv:1606.07947;
Geoffrey Hinton, Oriol Vinyals and Jeff Dean, "Distilling the Knowledge in a Neural Network",
arXiv:1503.02531 (temperature).

At every position of a given sequence the student's next-token distribution Q_τ = softmax(s/τ) is
drawn to the teacher's P_τ = softmax(t/τ):

    L = (1 - w) τ^2 mean_t D(P_τ, Q_τ) + w L_CE

with D one of `objectives.divergences`. The factor τ^2 keeps the gradient's scale when τ changes
(Hinton et al., Sec. 2); it is a switch because half of the published code leaves it out. On fixed
data a reverse KL is not the on-policy reverse KL of MiniLLM: the sequences are not the student's.
"""

from stillhouse.errors import UserError
from stillhouse.families.sequence.sft import sft
from stillhouse.objectives.divergences import DivergenceName, named_divergence
from stillhouse.objectives.tokens import token_cross_entropy, token_divergence
from stillhouse.ranges import Positive, Share
from stillhouse.records.language import LanguageOutput, LanguageSignal, SequenceBatch
from stillhouse.records.losses import LossTerms


def word_kd(
    student: LanguageOutput,
    signal: LanguageSignal,
    batch: SequenceBatch,
    *,
    divergence: DivergenceName = "forward_kl",
    beta: float = 0.5,
    alpha: float = 0.1,
    temperature: Positive = 1.0,
    scale_by_temperature_squared: bool = True,
    cross_entropy_weight: Share = 0.0,
) -> LossTerms:
    """Return the distillation loss, a mean over the tokens that count.

    Args:
        student: the student's output.
        signal: the teacher's, at the same positions.
        batch: the sequences; its labels are read only by the cross-entropy.
        divergence: a name of the table in `objectives.divergences`.
        beta: β of `jsd`.
        alpha: α of the skewed divergences.
        temperature: τ of both distributions.
        scale_by_temperature_squared: whether the divergence is multiplied by τ^2.
        cross_entropy_weight: w in [0, 1].

    Raises:
        UserError: for a temperature or a weight outside its range.
    """
    if temperature <= 0:
        raise UserError(f"method.temperature={temperature}: expected a number above 0")
    if not 0 <= cross_entropy_weight <= 1:
        raise UserError(f"method.cross_entropy_weight={cross_entropy_weight}: expected 0 to 1")
    if cross_entropy_weight == 1.0:
        return sft(student, None, batch)
    measure = named_divergence(divergence, beta=beta, alpha=alpha)
    kd = token_divergence(student, signal, batch.mask, divergence=measure, temperature=temperature)
    terms = {divergence: kd.detach()}
    if scale_by_temperature_squared:
        kd = temperature**2 * kd
    if cross_entropy_weight == 0.0:
        return LossTerms(total=kd, terms=terms)
    cross_entropy = token_cross_entropy(student, batch.labels, batch.mask)
    total = (1 - cross_entropy_weight) * kd + cross_entropy_weight * cross_entropy
    return LossTerms(total=total, terms=terms | {"cross_entropy": cross_entropy.detach()})
