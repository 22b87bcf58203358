import math
from functools import partial

import pytest
import torch

from stillhouse.data.encoding import text_as_tokens
from stillhouse.data.windows import TokenWindows, collate_windows
from stillhouse.evaluation.language import held_out_quality
from stillhouse.records.language import SequenceBatch

WINDOWS = TokenWindows(
    [text_as_tokens(d, 0) for d in ([3, 1, 4, 1, 5, 9, 2, 6], [3, 5], [8, 9, 7, 9, 3])],
    length=6,
    end_token=0,
    packing=False,
).in_order()
TOKENS = 18
collate = partial(collate_windows, pad_token=0)
PADDED = [collate(WINDOWS[:2]), collate(WINDOWS[2:])]
ALONE = ("test_nll", "next_token_accuracy")
AGAINST_TEACHER = ("kl_to_teacher", "top1_agreement", "expected_acceptance")


@torch.no_grad()
def naive_quality(model, reference, columns: int) -> dict[str, float]:
    """Token by token, window by window, without padding or records."""
    sums = dict.fromkeys((*ALONE, *AGAINST_TEACHER), 0.0)
    for window in WINDOWS:
        rows = zip(
            model(input_ids=window.input_ids.unsqueeze(0)).logits[0],
            reference(input_ids=window.input_ids.unsqueeze(0)).logits[0],
            window.labels,
            strict=True,
        )
        for s, t, label in rows:
            sums["test_nll"] -= math.log(s.softmax(-1)[label])
            sums["next_token_accuracy"] += float(s.argmax() == label)
            Q, P = s[:columns].softmax(-1), t[:columns].softmax(-1)
            sums["kl_to_teacher"] += sum(
                p * math.log(p / q) for p, q in zip(P.tolist(), Q.tolist(), strict=True)
            )
            sums["top1_agreement"] += float(Q.argmax() == P.argmax())
            sums["expected_acceptance"] += torch.minimum(P, Q).sum().item()
    return {name: total / TOKENS for name, total in sums.items()}


@torch.no_grad()
def related_models(tiny_llama, student_rows: int, teacher_rows: int):
    """Two models near enough to each other to agree on some tokens."""
    model, reference = (
        tiny_llama(1, vocab_size=student_rows),
        tiny_llama(1, vocab_size=teacher_rows),
    )
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        rows = min(len(p), len(q))
        q[:rows] = p[:rows] + 0.1 * torch.randn_like(p[:rows])
    return model, reference


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(23, 23), (29, 23), (23, 29)])
def test_quality_is_that_of_a_naive_loop(tiny_llama, student_rows, teacher_rows):
    model, reference = related_models(tiny_llama, student_rows, teacher_rows)
    ours = held_out_quality(model, reference, PADDED, text_bytes=None)
    assert ours == pytest.approx(naive_quality(model, reference, 23), rel=1e-6)
    assert 0 < ours["top1_agreement"] < 1
    assert ours["kl_to_teacher"] > 0.01


def test_accuracy_counts_the_likeliest_tokens_that_came(tiny_llama):
    model = tiny_llama()
    ids = torch.arange(8).unsqueeze(0)
    labels = model(input_ids=ids).logits.argmax(-1)
    labels[0, 5:] = (labels[0, 5:] + 1) % 23
    batch = SequenceBatch(ids, labels, torch.arange(8).unsqueeze(0) > 1)
    quality = held_out_quality(model, None, [batch], text_bytes=None)
    assert quality["next_token_accuracy"] == 0.5


def test_bits_per_byte_are_all_nats_over_the_bytes_of_the_text(tiny_llama):
    quality = held_out_quality(tiny_llama(), None, PADDED, text_bytes=61)
    all_bits = quality["test_nll"] * TOKENS / math.log(2)
    assert quality["bits_per_byte"] == pytest.approx(all_bits / 61, rel=1e-12)
    assert set(quality) == {*ALONE, "bits_per_byte"}
    assert set(held_out_quality(tiny_llama(), None, PADDED, text_bytes=None)) == set(ALONE)


def test_model_agrees_with_itself(tiny_llama):
    quality = held_out_quality(tiny_llama(1), tiny_llama(1), PADDED, text_bytes=None)
    assert quality["kl_to_teacher"] == 0
    assert quality["top1_agreement"] == 1
    assert quality["expected_acceptance"] == 1


def test_padding_is_not_counted_whatever_it_holds(tiny_llama):
    model, reference = tiny_llama(1), tiny_llama(2)
    one_by_one = held_out_quality(model, reference, map(collate_one, WINDOWS), text_bytes=61)
    refilled = [
        SequenceBatch(
            input_ids=batch.input_ids.masked_fill(~batch.mask, 17),
            labels=batch.labels.masked_fill(~batch.mask, 11),
            mask=batch.mask,
            attention_mask=batch.attention_mask,
        )
        for batch in PADDED
    ]
    assert not all(batch.mask.all() for batch in PADDED)
    for batches in (PADDED, refilled):
        quality = held_out_quality(model, reference, batches, text_bytes=61)
        assert quality == pytest.approx(one_by_one, rel=1e-9)


def collate_one(window) -> SequenceBatch:
    return collate([window])
