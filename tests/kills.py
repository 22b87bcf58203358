"""Functions of a test file in processes of their own, which are killed at some place."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


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
