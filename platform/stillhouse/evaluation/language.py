"""How good a language model is on held-out text, and how near to its teacher."""

import math
from collections.abc import Iterable, Mapping

import torch
from transformers import PreTrainedModel

from stillhouse.objectives.divergences import forward_kl, total_variation
from stillhouse.objectives.tokens import log_probs
from stillhouse.records.language import SequenceBatch
from stillhouse.students.causal_lm import read_output


@torch.no_grad()
def held_out_quality(
    model: PreTrainedModel,
    reference: PreTrainedModel | None,
    batches: Iterable[SequenceBatch],
    *,
    text_bytes: int | None,
) -> Mapping[str, float]:
    """Compare a model with held-out text and, where there is one, with its teacher.

    Args:
        model: the model, in eval mode.
        reference: the teacher, in eval mode; None leaves the comparison out.
        batches: the text, every token predicted once.
        text_bytes: UTF-8 bytes of that text; None when the batches are not all of it.

    Returns:
        `test_nll` (nats a token), `next_token_accuracy` (share of tokens that were the likeliest),
        `bits_per_byte` (all nats, the end tokens' included, over the bytes of the text), and
        against the teacher, means over tokens: `kl_to_teacher` = KL(P, Q)
        in nats, `top1_agreement`, and `expected_acceptance` = 1 - TV(P, Q), the probability that
        speculative decoding keeps a token that the model drafts for the teacher.
    """
    sums: dict[str, float] = {}
    tokens = 0

    def add(name: str, per_token: torch.Tensor, mask: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + per_token[mask].double().sum().item()

    for batch in batches:
        student_logits = read_output(model, batch).logits
        log_q = log_probs(student_logits)
        nll = -log_q.gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
        add("test_nll", nll, batch.mask)
        add("next_token_accuracy", (log_q.argmax(-1) == batch.labels).float(), batch.mask)
        tokens += int(batch.mask.sum())
        if reference is None:
            continue
        same = reference is model
        logits = student_logits if same else read_output(reference, batch).logits
        shared = min(logits.shape[-1], log_q.shape[-1])
        log_p = log_probs(logits[..., :shared])
        if shared < log_q.shape[-1]:
            log_q = log_q[..., :shared].log_softmax(-1)
        add("kl_to_teacher", forward_kl(log_q, log_p), batch.mask)
        add("top1_agreement", (log_p.argmax(-1) == log_q.argmax(-1)).float(), batch.mask)
        add("expected_acceptance", 1 - total_variation(log_q, log_p), batch.mask)

    means = {name: total / tokens for name, total in sums.items()}
    if text_bytes is not None:
        means["bits_per_byte"] = sums["test_nll"] / math.log(2) / text_bytes
    return means
