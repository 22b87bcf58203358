"""The command line as tests run it: in this process, or as a real one."""

import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from stillhouse import cli

ROOT = Path(__file__).parents[1]
TINY = ("debug=tiny", "tracking=csv", "paths.outputs=outputs")


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a real command: offline, one thread, a cache of its own."""
    paths = [str(ROOT / "platform"), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "OMP_NUM_THREADS": "1",
        "STILLHOUSE_CACHE": str(cache),
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
    }


def command_line(*arguments: str) -> list[str]:
    """Return the words of `python run.py …`."""
    return [sys.executable, str(ROOT / "run.py"), *arguments]


def run_process(*arguments: str, folder: Path, cache: Path, seconds: float = 300) -> Finished:
    """Run `python run.py …` in `folder` as a process of its own."""
    done = subprocess.run(
        command_line(*arguments),
        cwd=folder,
        env=environment(cache),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def start_process(*arguments: str, folder: Path, cache: Path) -> subprocess.Popen[str]:
    """Start `python run.py …` in `folder` as a process of a group of its own."""
    return subprocess.Popen(
        command_line(*arguments),
        cwd=folder,
        env=environment(cache),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell starts background jobs, perhaps this test run, with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL a process and its children."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def run_here(capfd, *arguments: str) -> Finished:
    """Run the command line in this process, in the present folder."""
    capfd.readouterr()
    code = cli.run(list(arguments))
    captured = capfd.readouterr()
    return Finished(code, captured.out, captured.err)


def only_run(outputs: Path) -> Path:
    """Return the one run directory below a folder of outputs."""
    (results,) = outputs.glob("*/*/results.json")
    return results.parent


def fail_at_export(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stage of language models train, and fail when it hands its student on."""
    from stillhouse.families.sequence.module import SequenceDistiller

    def fail(*args: object) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(SequenceDistiller, "export", fail)
