"""The counts of `scaling.py`, by hand."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scripts import imported

FILE = Path(__file__).parents[2] / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def scaling() -> Iterator[Any]:
    with imported(FILE) as module:
        yield module


def test_a_gpu_of_four_sends_and_holds_what_a_ring_passes(scaling: Any) -> None:
    setting = scaling.Setting(student=100, teacher=1000, tokens=10, weight_bytes=2)
    replicated, cached, whole, sharded, _ = scaling.WAYS
    # 200 bytes of weights, of which a ring of four passes three quarters at a time.
    assert scaling.sent(setting, replicated, 4) == 2 * 150
    assert scaling.sent(setting, whole, 4) == 3 * 150
    assert scaling.sent(setting, sharded, 4) == 3 * 150 + 1500
    assert scaling.held(setting, replicated, 4) == 1600 + 2000
    assert scaling.held(setting, sharded, 4) == (1600 + 2000) / 4
    assert scaling.held(setting, cached, 4) == 1600
    assert scaling.computed(setting, cached) == 10 * 600
    assert scaling.computed(setting, whole) == 10 * (600 + 2000)


def test_a_step_takes_the_longer_of_computing_and_sending(scaling: Any) -> None:
    cached = scaling.WAYS[1]
    slow = {"student": 100, "tokens": 10, "flops": 6000.0, "within": 1e9}
    # 1 s of computing; 64 GPUs pass 2 · 63/64 · 200 bytes, here in 2 s.
    setting = scaling.Setting(**slow, between=2 * 63 / 64 * 200 / 2)
    assert scaling.efficiency(setting, cached, 64) == pytest.approx(0.5)
    assert scaling.efficiency(setting, cached, 8) == 1


def test_a_key_that_it_does_not_know_is_named(scaling: Any) -> None:
    with pytest.raises(SystemExit, match=r"^token: expected some of student, teacher, tokens"):
        scaling.main("token=5")
