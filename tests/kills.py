"""Functions of a test file in processes of their own, killed at some place; what they leave."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def started(function: Callable[..., None], *arguments: str) -> subprocess.Popen[bytes]:
    """Call a test file's function with strings in a process of its own."""
    file = Path(function.__code__.co_filename)
    paths = os.pathsep.join([str(file.parent), *sys.path])
    code = f"import sys, {file.stem}; {file.stem}.{function.__name__}(*sys.argv[1:])"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL
    )


def kill_at(process: subprocess.Popen[bytes], wanted: int, reached: Callable[[], int]) -> None:
    """SIGKILL a process as soon as it has reached what is wanted."""
    deadline = time.monotonic() + 120
    try:
        while reached() < wanted:
            assert process.poll() is None, f"the process ended before {wanted}"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.kill()
        process.wait()


def same(found: Any, expected: Any) -> bool:
    """Compare nested dicts and lists of tensors bit for bit."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(
            same(found[key], value) for key, value in expected.items()
        )
    if isinstance(expected, list):
        return all(same(a, b) for a, b in zip(found, expected, strict=True))
    return torch.equal(found, expected) if isinstance(expected, torch.Tensor) else found == expected
