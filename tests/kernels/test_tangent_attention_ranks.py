"""Attention's tangent and gradients in two processes: data parallelism and FSDP2, on gloo."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_tangents import derive, one_pass_under_fsdp2

pytestmark = pytest.mark.slow


def run(work: Any, *arguments: object) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(work, arguments, nprocs=2)


@pytest.mark.parametrize(("wrapping", "passes"), [("ddp", "one"), ("ddp", "two"), ("fsdp", "two")])
def test_two_ranks_take_the_step_of_both_rows(wrapping: str, passes: str, tmp_path: Path) -> None:
    run(derive, str(tmp_path), wrapping, passes)


def test_one_pass_under_fsdp2_raises(tmp_path: Path) -> None:
    run(one_pass_under_fsdp2, str(tmp_path))
