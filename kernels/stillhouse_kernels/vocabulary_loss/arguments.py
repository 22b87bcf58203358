"""What `linear_divergence` refuses, each in one line."""

import math
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from stillhouse_kernels.vocabulary_loss.settings import Divergence, Shaping, TeacherTopK

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

Pair = float | tuple[float | None, float | None] | None


def checked_weight(divergence: str, beta: float | None, alpha: float | None) -> tuple[float, float]:
    """Return β and α, with their defaults filled in, where the named divergence can take them."""
    beta, alpha = 0.5 if beta is None else beta, 0.1 if alpha is None else alpha
    if divergence not in get_args(Divergence):
        known = ", ".join(get_args(Divergence))
        raise ValueError(f"divergence={divergence!r}: expected one of {known}")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta={beta}: expected the teacher's weight in jsd, in [0, 1]")
    if not 0 <= alpha < 1:
        raise ValueError(f"alpha={alpha}: expected the skew of a skewed KL, in [0, 1)")
    return beta, alpha


def shapings(logit_scale: Pair, logit_softcap: Pair) -> tuple[Shaping, Shaping]:
    """Return the student's and the teacher's."""
    scales, caps = _pair("logit_scale", logit_scale), _pair("logit_softcap", logit_softcap)
    for cap in caps:
        if cap is not None and not 0 < cap < math.inf:
            raise ValueError(
                f"logit_softcap={logit_softcap}: expected numbers above 0, or None for no soft cap"
            )
    for scale in scales:
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"logit_scale={logit_scale}: expected finite numbers, or None for 1")
    student, teacher = (
        Shaping(1.0 if scale is None else float(scale), None if cap is None else float(cap))
        for scale, cap in zip(scales, caps, strict=True)
    )
    return student, teacher


def _pair(name: str, value: Pair) -> tuple[float | None, float | None]:
    if not isinstance(value, tuple | list):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}={value}: expected one value or a pair (student, teacher)")
    return value[0], value[1]


def check_numbers(temperature: float, chunk_size: int | None) -> None:
    """Refuse what is not above 0."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature}: expected a number above 0")
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size={chunk_size}: expected at least 1 token, or None to choose")


def checked_top_k(
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    teacher_topk: TeacherTopK | Sequence[Tensor] | None,
) -> TeacherTopK | None:
    """Return the top-k as a record where it stands in place of the teacher's head."""
    dense = (teacher_hidden, teacher_weight)
    if teacher_topk is None:
        if any(x is None for x in dense):
            raise ValueError(
                "the teacher is missing: give teacher_hidden and teacher_weight, or teacher_topk"
            )
        return None
    if any(x is not None for x in (*dense, teacher_bias)):
        raise ValueError(
            "teacher_topk stands in place of the teacher's hidden states and head: leave "
            "teacher_hidden, teacher_weight and teacher_bias None, or teacher_topk"
        )
    if not 3 <= len(teacher_topk) <= 5:
        raise ValueError(
            f"teacher_topk has {len(teacher_topk)} entries: expected (ids, log_probs, "
            "log_residual), or a TeacherTopK"
        )
    ids, log_probs, log_residual, *drawn = teacher_topk
    drawn = (None if t is None else t.detach() for t in drawn)
    top_k = TeacherTopK(ids.detach(), log_probs.detach(), log_residual.detach(), *drawn)
    if (top_k.tail_ids is None) != (top_k.tail_entropy is None):
        raise ValueError("teacher_topk: tail_ids and tail_entropy go together, one is missing")
    return top_k


def check_tensors(tensors: dict[str, Tensor | None], *, autocast: bool) -> None:
    """Refuse shapes that do not fit, and mixed devices and dtypes.

    Args:
        tensors: by the names of `linear_divergence`'s arguments and `TeacherTopK`'s fields.
        autocast: whether the floating tensors will be cast to one dtype.
    """
    given = {name: x for name, x in tensors.items() if x is not None}
    if wrong := _misfit(given):
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in given.items())
        raise ValueError(f"{wrong}; got {shapes}")
    if len({x.device for x in given.values()}) > 1:
        places = ", ".join(f"{name} on {x.device}" for name, x in given.items())
        raise ValueError(f"the tensors lie on different devices: {places}; move them to one")
    _check_dtypes(given, autocast)


def _misfit(given: dict[str, Tensor]) -> str | None:
    """What does not fit, or None."""
    student = given["student_hidden"]
    for model in ("student", "teacher"):
        hidden, weight = given.get(f"{model}_hidden"), given.get(f"{model}_weight")
        if hidden is None or weight is None:
            continue
        if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
            return (
                f"{model}: expected hidden [tokens, width] and weight [vocabulary, width] of one "
                "width; flatten batch and sequence with flatten(0, -2)"
            )
        if not weight.shape[0]:
            return f"{model}_weight: expected a vocabulary of at least one token"
        bias = given.get(f"{model}_bias")
        if bias is not None and bias.shape != weight.shape[:1]:
            return f"{model}_bias: expected [vocabulary], as many as {model}_weight has rows"
    if "teacher_hidden" in given:
        if given["teacher_hidden"].shape[0] != student.shape[0]:
            return "student_hidden and teacher_hidden: expected the same tokens in both"
        if given["teacher_weight"].shape[0] != given["student_weight"].shape[0]:
            return (
                "student_weight and teacher_weight: expected equal vocabularies; slice a padded "
                "one to the shared rows"
            )
    else:
        rank = {"ids": 2, "log_probs": 2, "log_residual": 1, "tail_ids": 2, "tail_entropy": 1}
        fields = {name: given[name] for name in rank if name in given}
        short = any(x.ndim != rank[n] or x.shape[0] != student.shape[0] for n, x in fields.items())
        k, vocabulary = given["ids"].shape[-1:], given["student_weight"].shape[0]
        if short or given["log_probs"].shape[-1:] != k or not 1 <= k[0] <= vocabulary:
            return (
                "teacher_topk: expected ids and log_probs [tokens, k], log_residual [tokens], "
                "tail_ids [tokens, s] and tail_entropy [tokens], 1 <= k <= vocabulary"
            )
    mask = given.get("mask")
    if mask is not None and mask.shape != student.shape[:1]:
        return "mask: expected [tokens]; flatten batch and sequence as for the hidden states"
    return None


def _check_dtypes(given: dict[str, Tensor], autocast: bool) -> None:
    mask = given.get("mask")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}: expected torch.bool; True = the token counts")
    for name in ("ids", "tail_ids"):
        if name in given and given[name].dtype != torch.int64:
            raise ValueError(f"teacher_topk.{name} is {given[name].dtype}: expected torch.int64")
    for name in ("log_probs", "log_residual", "tail_entropy"):
        if name in given and given[name].dtype not in _DTYPES:
            raise ValueError(f"teacher_topk.{name} is {given[name].dtype}: expected a float dtype")
    for model in ("student", "teacher"):
        parts = {name: x for name, x in given.items() if name.startswith(model)}
        known = all(x.dtype in _DTYPES for x in parts.values())
        if known and (autocast or len({x.dtype for x in parts.values()}) <= 1):
            continue
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in parts.items())
        raise ValueError(
            f"the {model}'s dtypes differ, or are none of float64, float32, float16 and bfloat16: "
            f"{dtypes}; cast them to one, or use autocast"
        )


def check_ids(teacher: TeacherTopK, kept: Tensor | None, vocabulary: int) -> None:
    """Refuse ids outside of the vocabulary in the rows that count (mask or indices; None = all)."""
    for name in ("ids", "tail_ids"):
        ids = getattr(teacher, name)
        if ids is None:
            continue
        ids = ids if kept is None else ids[kept]
        if not ids.numel():
            continue
        low, high = torch.stack(ids.aminmax()).tolist()
        if low < 0 or high >= vocabulary:
            raise ValueError(
                f"teacher_topk.{name} run from {low} to {high}: expected 0 to {vocabulary - 1}, "
                f"the rows of student_weight [{vocabulary}, ...]; mask out rows without a token"
            )
