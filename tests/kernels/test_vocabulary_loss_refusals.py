"""What the loss refuses, message by message."""

from typing import Any

import pytest
import torch
from vocabulary_heads import problem

from stillhouse_kernels.vocabulary_loss import linear_divergence


def refusal(**changes: Any) -> str:
    p = problem(n=4, V=5, H=3, Ht=2).to(torch.float32)
    arguments: dict[str, Any] = {"student_hidden": p.X, "student_weight": p.W}
    arguments |= {"teacher_hidden": p.Y, "teacher_weight": p.U}
    with pytest.raises(ValueError, match=r"\A[^\n]+\Z") as e:
        linear_divergence(**(arguments | changes))
    return str(e.value)


KEPT = (torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2), torch.zeros(4))
NO_TEACHER: dict[str, Any] = {"teacher_hidden": None, "teacher_weight": None}
GOT = (
    "; got student_hidden [4, 3], student_weight [5, 3], teacher_hidden [4, 2], "
    "teacher_weight [5, 2]"
)
REFUSALS: list[tuple[dict[str, Any], str]] = [
    (
        {"student_weight": torch.zeros(5, 7)},
        "student: expected hidden [tokens, width] and weight [vocabulary, width] of one width; "
        "flatten batch and sequence with flatten(0, -2)" + GOT.replace("[5, 3]", "[5, 7]"),
    ),
    (
        {"teacher_hidden": torch.zeros(2, 2, 2)},
        "teacher: expected hidden [tokens, width] and weight [vocabulary, width] of one width; "
        "flatten batch and sequence with flatten(0, -2)" + GOT.replace("[4, 2]", "[2, 2, 2]"),
    ),
    (
        {"teacher_hidden": torch.zeros(3, 2)},
        "student_hidden and teacher_hidden: expected the same tokens in both"
        + GOT.replace("[4, 2]", "[3, 2]"),
    ),
    (
        {"teacher_weight": torch.zeros(6, 2)},
        "student_weight and teacher_weight: expected equal vocabularies; slice a padded one to the "
        "shared rows" + GOT.replace("[5, 2]", "[6, 2]"),
    ),
    (
        {"student_bias": torch.zeros(4)},
        "student_bias: expected [vocabulary], as many as student_weight has rows; got "
        "student_hidden [4, 3], student_weight [5, 3], student_bias [4], teacher_hidden [4, 2], "
        "teacher_weight [5, 2]",
    ),
    (
        {"mask": torch.ones(2, 2, dtype=torch.bool)},
        "mask: expected [tokens]; flatten batch and sequence as for the hidden states"
        + GOT
        + ", mask [2, 2]",
    ),
    (
        {"teacher_topk": (KEPT[0], KEPT[1][:, :1], KEPT[2]), **NO_TEACHER},
        "teacher_topk: expected ids and log_probs [tokens, k], log_residual [tokens], tail_ids "
        "[tokens, s] and tail_entropy [tokens], 1 <= k <= vocabulary; got student_hidden [4, 3], "
        "student_weight [5, 3], ids [4, 2], log_probs [4, 1], log_residual [4]",
    ),
    (
        {"student_hidden": torch.zeros(4, 3).half()},
        "the student's dtypes differ, or are none of float64, float32, float16 and bfloat16: "
        "student_hidden torch.float16, student_weight torch.float32; cast them to one, or use "
        "autocast",
    ),
    (
        {"teacher_hidden": torch.zeros(4, 2).to(torch.float8_e4m3fn)},
        "the teacher's dtypes differ, or are none of float64, float32, float16 and bfloat16: "
        "teacher_hidden torch.float8_e4m3fn, teacher_weight torch.float32; cast them to one, or "
        "use autocast",
    ),
    (
        {"student_weight": torch.zeros(0, 3), "teacher_weight": torch.zeros(0, 2)},
        "student_weight: expected a vocabulary of at least one token"
        + GOT.replace("[5, 3]", "[0, 3]").replace("[5, 2]", "[0, 2]"),
    ),
    (
        {"temperature": float("inf")},
        "temperature=inf: expected a number above 0",
    ),
    (
        {"logit_scale": float("nan")},
        "logit_scale=nan: expected finite numbers, or None for 1",
    ),
    (
        {"logit_softcap": float("inf")},
        "logit_softcap=inf: expected numbers above 0, or None for no soft cap",
    ),
    (
        {"chunk_size": 2.5},
        "chunk_size=2.5: expected at least 1 token, or None to choose",
    ),
    (
        NO_TEACHER | {"teacher_topk": (KEPT[0], KEPT[0], KEPT[2])},
        "teacher_topk.log_probs is torch.int64: expected a float dtype",
    ),
    (
        {"teacher_weight": torch.zeros(5, 2, device="meta")},
        "the tensors lie on different devices: student_hidden on cpu, student_weight on cpu, "
        "teacher_hidden on cpu, teacher_weight on meta; move them to one",
    ),
    (
        {"mask": torch.ones(4)},
        "mask is torch.float32: expected torch.bool; True = the token counts",
    ),
    (
        {"teacher_topk": (KEPT[0].int(), *KEPT[1:]), **NO_TEACHER},
        "teacher_topk.ids is torch.int32: expected torch.int64",
    ),
    (
        {"teacher_topk": (KEPT[0] + 5, *KEPT[1:]), **NO_TEACHER},
        "teacher_topk.ids run from 5 to 5: expected 0 to 4, the rows of student_weight [5, ...]; "
        "mask out rows without a token",
    ),
    ({"beta": 1.5}, "beta=1.5: expected the teacher's weight in jsd, in [0, 1]"),
    ({"alpha": 1.0}, "alpha=1.0: expected the skew of a skewed KL, in [0, 1)"),
    ({"temperature": 0.0}, "temperature=0.0: expected a number above 0"),
    ({"chunk_size": 0}, "chunk_size=0: expected at least 1 token, or None to choose"),
    (
        {"logit_softcap": (30.0, 0.0)},
        "logit_softcap=(30.0, 0.0): expected numbers above 0, or None for no soft cap",
    ),
    (
        {"logit_scale": (1.0, 1.0, 1.0)},
        "logit_scale=(1.0, 1.0, 1.0): expected one value or a pair (student, teacher)",
    ),
    (
        {"divergence": "kl"},
        "divergence='kl': expected one of forward_kl, reverse_kl, jsd, skew_forward_kl, "
        "skew_reverse_kl, total_variation",
    ),
    (
        NO_TEACHER,
        "the teacher is missing: give teacher_hidden and teacher_weight, or teacher_topk",
    ),
    (
        {"teacher_topk": KEPT},
        "teacher_topk stands in place of the teacher's hidden states and head: leave "
        "teacher_hidden, teacher_weight and teacher_bias None, or teacher_topk",
    ),
    (
        {"teacher_topk": KEPT[:2], **NO_TEACHER},
        "teacher_topk has 2 entries: expected (ids, log_probs, log_residual), or a TeacherTopK",
    ),
    (
        {"teacher_topk": (*KEPT, KEPT[0]), **NO_TEACHER},
        "teacher_topk: tail_ids and tail_entropy go together, one is missing",
    ),
    (
        {"backend": "fast"},
        "backend='fast': expected one of auto, reference, streaming, triton",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSALS)
def test_bad_input_is_one_line(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message
    assert "\n" not in message
