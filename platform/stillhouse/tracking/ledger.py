"""The ledger of a sweep: each of its jobs, how far it is, and why it failed.

A job has a file of its own in `<sweep>/.jobs`, so that workers of a launcher, or machines, write
nothing in common. The jobs are named before the first begins; how far one is comes from its run
directory:

| state | what there is |
|---|---|
| waiting | the job's name alone |
| running | a run directory that a process holds |
| killed | one that no process holds, without an end |
| failed | the reason, in a line |
| done | a record that says so |
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from stillhouse.errors import UserError
from stillhouse.files import LOCK, write_json
from stillhouse.tracking.runs import read_results

FOLDER = ".jobs"
WAITING, RUNNING, KILLED, FAILED, DONE = "waiting", "running", "killed", "failed", "done"


# Sweeps that this process has begun and not yet told of.
_begun: list[Path] = []


@dataclass(frozen=True)
class Job:
    """A job of a sweep, as its file has it.

    Attributes:
        number: its place in the sweep, from 0.
        overrides: the `key=value` that make it.
        folder: its run directory, within the sweep's folder; None before it begins.
        process: that works on it, or did, as host:pid; None before it begins.
        reason: why it failed; None where it did not.
    """

    number: int
    overrides: Sequence[str]
    folder: str | None = None
    process: str | None = None
    reason: str | None = None

    def write(self, sweep: Path) -> None:
        """Write its file, whole or not at all."""
        folder = sweep / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{self.number}.json", asdict(self))

    def failed(self, reason: str) -> "Job":
        """Return it with the reason."""
        return replace(self, reason=reason)


@dataclass(frozen=True)
class Entry:
    """A line of the ledger.

    Attributes:
        job: which.
        state: how far it is.
        seconds: that the stages took which it made itself; None before one is done.
    """

    job: Job
    state: str
    seconds: float | None


class SweepLedger(Callback):
    """Names the jobs of a sweep before the first begins; Hydra calls it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Write a file for each job that the command line asks for and that is to run."""
        del kwargs
        if config.get("plan"):
            return
        sweep = Path(config.hydra.sweep.dir)
        _begun.append(sweep)
        kept = {e.job.number for e in read_ledger(sweep) if e.state not in (FAILED, KILLED)}
        for number, overrides in enumerate(_combinations(list(config.hydra.overrides.task))):
            if number not in kept:
                Job(number, overrides).write(sweep)


def read_ledger(sweep: Path) -> list[Entry]:
    """Return the jobs of a sweep in their order; none where the folder has no ledger."""
    jobs = [Job(**json.loads(file.read_text())) for file in (sweep / FOLDER).glob("*.json")]
    return [_entry(sweep, job) for job in sorted(jobs, key=lambda job: job.number)]


def is_held(folder: Path) -> bool:
    """Return whether a process works in a run directory."""
    if not (folder / LOCK).is_file():
        return False
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def taken() -> list[Path]:
    """Return the sweeps that this process has begun since it was asked last."""
    sweeps = [*_begun]
    _begun.clear()
    return sweeps


def tell_unfinished(sweep: Path) -> bool:
    """Say which jobs did not come to their end, and why; return whether there are any."""
    entries = read_ledger(sweep)
    rest = [entry for entry in entries if entry.state != DONE]
    if not rest:
        return False
    counts = ", ".join(f"{n} {state}" for state, n in _counts(rest).items())
    print(f"error: of {len(entries)} jobs {counts}:", file=sys.stderr)
    own = _own_keys(entries)
    for entry in rest:
        number, why = entry.job.number, entry.job.reason or entry.state
        print(f"  job {number} ({own[number]}): {why}", file=sys.stderr)
    print(
        f"run the same command with hydra.sweep.dir={sweep} to run only these again",
        file=sys.stderr,
    )
    return True


def show_ledger(config: DictConfig, folder: Path) -> None:
    """Print the ledger of a sweep: the job `jobs`.

    Args:
        config: with `sweep`, the folder.
        folder: not written to.

    Raises:
        UserError: for a folder without a ledger.
    """
    del folder
    sweep = Path(config.sweep)
    entries = read_ledger(sweep)
    if not entries:
        raise UserError(
            f"sweep={sweep}: there is no ledger of jobs; expected the folder of a sweep, such as "
            "multirun/<time>"
        )
    table, own = Table("job", "state", "keys", "seconds", "why"), _own_keys(entries)
    for entry in entries:
        seconds = "" if entry.seconds is None else f"{entry.seconds:.0f}"
        table.add_row(
            str(entry.job.number),
            entry.state,
            own[entry.job.number],
            seconds,
            entry.job.reason or "",
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(", ".join(f"{count} {state}" for state, count in _counts(entries).items()))


def _own_keys(entries: Sequence[Entry]) -> dict[int, str]:
    """Return for each job the keys that not all jobs of the sweep have."""
    all_keys = [set(entry.job.overrides) for entry in entries]
    shared = set.intersection(*all_keys) if len(entries) > 1 else set()
    return {
        entry.job.number: " ".join(o for o in entry.job.overrides if o not in shared)
        for entry in entries
    }


def _counts(entries: Sequence[Entry]) -> dict[str, int]:
    states = [entry.state for entry in entries]
    return {s: states.count(s) for s in (DONE, RUNNING, WAITING, FAILED, KILLED) if s in states}


def _entry(sweep: Path, job: Job) -> Entry:
    if job.folder is None:
        return Entry(job, WAITING, None)
    folder = sweep / job.folder
    results = read_results(folder) or {}
    stages = results.get("stages", {}).values()
    taken = [s["seconds"] for s in stages if s["seconds"] is not None and s["status"] != "cached"]
    seconds = sum(taken) if taken else None
    if job.reason is not None:
        return Entry(job, FAILED, seconds)
    if is_held(folder):
        return Entry(job, RUNNING, seconds)
    ended = results.get("status") in (DONE, "stopped")
    return Entry(job, DONE if ended else KILLED, seconds)


def _combinations(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each job, as Hydra's basic sweeper numbers them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    parsed = OverridesParser.create().parse_overrides(overrides)
    (batches,) = BasicSweeper.split_arguments(parsed, None)
    return batches
