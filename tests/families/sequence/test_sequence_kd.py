"""Sequence-level KD: the loss of the teacher's sequence, and what its minimum over sequences is."""

import torch

from stillhouse.families.sequence.sequence_kd import sequence_kd
from stillhouse.records.language import LanguageOutput, SequenceBatch, VocabularyHead

V, T = 3, 2


def says(logits):
    return LanguageOutput(logits, VocabularyHead(torch.eye(V, dtype=logits.dtype)))


def batch_of(sequences, prompt: int = 0) -> SequenceBatch:
    """Sequences of labels; the first `prompt` of each are not learnt."""
    labels = torch.tensor(sequences)
    mask = (torch.arange(labels.shape[1]) >= prompt).expand_as(labels)
    return SequenceBatch(labels, labels, mask)


def test_loss_is_the_nll_of_the_generated_tokens_alone():
    s = torch.randn(2, 4, V, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    s.requires_grad_()
    labels = [[0, 2, 1, 1], [2, 2, 0, 1]]
    losses = sequence_kd(says(s), None, batch_of(labels, prompt=2))
    log_q = s.log_softmax(-1)
    expected = -sum(log_q[b, t, labels[b][t]] for b in (0, 1) for t in (2, 3)) / 4
    torch.testing.assert_close(losses.total, expected)
    torch.testing.assert_close(losses.terms["sequence_nll"], expected.detach())
    losses.total.backward()
    assert s.grad is not None
    assert s.grad[:, :2].abs().max() == 0


def test_over_drawn_sequences_it_is_forward_kl_over_sequences_up_to_the_teacher_s_entropy():
    """Two steps, three symbols: weighted by p(y), the loss is KL(p, q) + H(p), a token's share."""
    generator = torch.Generator().manual_seed(1)
    p1, q1 = torch.randn(2, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    p2, q2 = torch.randn(2, V, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    total = kl = entropy = torch.zeros((), dtype=torch.float64)
    for first in range(V):
        for second in range(V):
            log_p, log_q = p1[first] + p2[first, second], q1[first] + q2[first, second]
            logits = torch.stack([q1, q2[first]]).unsqueeze(0)
            loss = sequence_kd(says(logits), None, batch_of([[first, second]])).total
            total = total + log_p.exp() * T * loss
            kl = kl + log_p.exp() * (log_p - log_q)
            entropy = entropy - log_p.exp() * log_p
    torch.testing.assert_close(total, kl + entropy)
