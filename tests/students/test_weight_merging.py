"""Merging two tensors against float64 written out by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.students import weight_merging
from stillhouse.students.weight_merging import cosine, linear, slerp, weighted_sum

SHARES = (0.0, 0.2, 0.5, 0.9, 1.0)


def pair(*shape: int, dtype: Any = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    a, b = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(2))
    return a, b + 0.3 * a


def slerp_by_hand(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Shoemake's formula over lists of Python's numbers."""
    x, y = a.double().flatten().tolist(), b.double().flatten().tolist()
    dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
    theta = math.acos(dot / math.hypot(*x) / math.hypot(*y))
    first, second = (math.sin(s * theta) / math.sin(theta) for s in (1 - t, t))
    merged = [first * p + second * q for p, q in zip(x, y, strict=True)]
    return torch.tensor(merged, dtype=torch.float64).reshape(a.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("t", SHARES)
def test_slerp_is_the_formula_over_the_flattened_tensors(dtype, t: float) -> None:
    a, b = pair(7, 9, dtype=dtype)
    merged = slerp(a, b, weight=t)
    assert merged.dtype == dtype
    assert merged.shape == a.shape
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(merged.double(), slerp_by_hand(a, b, t), rtol=eps, atol=eps / 8)


@pytest.mark.parametrize("merge", [slerp, linear])
def test_ends_and_equal_tensors_are_kept(merge) -> None:
    a, b = pair(5, 11)
    assert torch.equal(merge(a, b, weight=0.0), a)
    assert torch.equal(merge(a, b, weight=1.0), b)
    for t in SHARES:
        assert torch.equal(merge(a, a, weight=t), a)
        torch.testing.assert_close(merge(a, b, weight=t), merge(b, a, weight=1 - t))


def test_the_arc_keeps_the_norm_and_the_line_cuts_it() -> None:
    a, b = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    a[0, 1], b[1, 2] = 3.0, -3.0
    assert slerp(a, b, weight=0.5).norm() == pytest.approx(3.0, rel=1e-12)
    assert linear(a, b, weight=0.5).norm() == pytest.approx(3.0 / math.sqrt(2), rel=1e-12)
    assert slerp(a, b, weight=1 / 3).norm() == pytest.approx(3.0, rel=1e-12)
    torch.testing.assert_close(
        slerp(a, b, weight=1 / 3), math.cos(math.pi / 6) * a + math.sin(math.pi / 6) * b
    )


@pytest.mark.parametrize(("cos", "straight"), [(0.9994, False), (0.9996, True), (-0.9996, True)])
def test_nearly_parallel_tensors_take_the_line(cos: float, straight: bool) -> None:
    a = torch.tensor([2.0, 0.0], dtype=torch.float64)
    b = torch.tensor([cos, math.sqrt(1 - cos**2)], dtype=torch.float64)
    merged = slerp(a, b, weight=0.25)
    assert torch.equal(merged, linear(a, b, weight=0.25)) == straight
    if not straight:
        torch.testing.assert_close(merged, slerp_by_hand(a, b, 0.25))


def test_zero_and_empty_tensors_give_numbers() -> None:
    a, zero = torch.ones(3), torch.zeros(3)
    assert cosine(a, zero) is None
    assert torch.equal(slerp(a, zero, weight=0.25), torch.full((3,), 0.75))
    assert torch.equal(slerp(zero, a, weight=0.25), torch.full((3,), 0.25))
    assert torch.equal(slerp(zero, zero, weight=0.5), zero)
    assert slerp(torch.empty(0, 4), torch.empty(0, 4), weight=0.5).shape == (0, 4)
    assert slerp(torch.tensor(2.0), torch.tensor(4.0), weight=0.5) == 3.0


def test_the_weights_of_a_sum_are_free_and_those_of_a_line_are_not() -> None:
    a, b = pair(4, 6, dtype=torch.float64)
    summed = weighted_sum(a, b, first_weight=1.0, second_weight=0.5)
    torch.testing.assert_close(summed, a + b / 2)
    torch.testing.assert_close(weighted_sum(a, a, first_weight=1.0, second_weight=0.5), 1.5 * a)
    same = weighted_sum(a, b, first_weight=0.7, second_weight=0.3)
    torch.testing.assert_close(same, linear(a, b, weight=0.3))


def test_some_entries_at_a_time_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair(13, 7, dtype=torch.float64)
    whole = slerp(a, b.T.contiguous().T, weight=0.4), cosine(a, b)
    monkeypatch.setattr(weight_merging, "ENTRIES_AT_A_TIME", 10)
    torch.testing.assert_close(slerp(a, b, weight=0.4), whole[0])
    assert cosine(a, b) == pytest.approx(whole[1], rel=1e-14)


def test_a_cosine_of_many_small_numbers_is_exact() -> None:
    """A float32 sum of 2^21 equal numbers is off in the fourth digit; float64 is not."""
    a = torch.full((1 << 21,), 1e-3)
    b = a.clone()
    b[::2] = 0
    assert cosine(a, b) == pytest.approx(math.sqrt(0.5), rel=1e-12)


@pytest.mark.parametrize("merge", [slerp, linear])
@pytest.mark.parametrize("t", [-0.1, 1.5, math.nan])
def test_a_share_outside_0_and_1_is_refused(merge, t: float) -> None:
    with pytest.raises(UserError) as refused:
        merge(*pair(2, 2), weight=t)
    assert str(refused.value) == (
        f"merging.weight={t}: expected the share of the second model, from 0 to 1"
    )


def test_a_weight_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError) as refused:
        weighted_sum(*pair(2, 2), first_weight=1.0, second_weight=math.inf)
    assert str(refused.value) == "merging.second_weight=inf: expected a finite number"
