"""Several processes for one stage: the ranks of `trainer.devices=2` and more.

The process that the user started is rank 0: it alone plans, locks, logs, draws and exports. When a
stage is about to train, rank 0 starts the others; each builds the same stage once more, trains in
step and ends with it, and knows nothing of the run around it. Lightning would start the same
command again, and would kill rank 0 without a word when another rank fails; so it is told that its
processes are there already (`LOCAL_RANK`), and who fails is told here.
"""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from multiprocessing.connection import Connection, wait
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from lightning.pytorch.strategies import ParallelStrategy
from rich.console import Console

from stillhouse.errors import UserError
from stillhouse.stages.stage import Stage, StageContext
from stillhouse.tracking.tracker import FileTracker

# What Lightning reads, or sets for whatever the process does next.
VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
VARIABLES += ("OMP_NUM_THREADS",)

# Seconds. A rank that failed has said so before its connections close, which is what rank 0 sees
# first; a rank whose training is done has nothing left to do; and rank 0 may sit in a collective of
# NCCL, which, unlike gloo's, waits for a dead rank until it times out, half an hour later.
UNTIL_TOLD = 5.0
UNTIL_ENDED = 30.0
UNTIL_FREED = 20.0

READY = (None, "built")
_to_rank_zero: ContextVar[Connection] = ContextVar("connection to rank 0")


class RankError(RuntimeError):
    """Another rank met a fault of ours; its traceback is the message."""


class Rank:
    """Another process of a stage, as rank 0 sees it."""

    def __init__(self, number: int, size: int, stage: Stage, context: StageContext) -> None:
        """Start rank `number` of `size`, which imports from where this process does."""
        self.name = f"rank {number} of {size} in the stage {context.name}"
        self.log = context.scratch / f"rank_{number}.log"
        self.is_ready = False
        self._failure: Exception | None = None
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {__name__} import serve; serve()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | {"LOCAL_RANK": str(number), "PYTHONPATH": paths},
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.reports = Connection(os.dup(self.process.stdout.fileno()), writable=False)
        self.process.stdin.write(
            pickle.dumps((stage, context.name, context.output, context.scratch))
        )
        # It stays open: that it closes tells the rank that rank 0 is no more.
        self.process.stdin.flush()

    def failure(self) -> Exception | None:
        """Return how the rank failed, as an error to raise; None when it did not."""
        code = self.process.poll()
        self._read()
        if self._failure is None and code:
            by = f"signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"code {code}"
            self._failure = UserError(
                f"{self.name} ended with {by}, perhaps for want of memory; its last words, if any, "
                f"are in {self.log}; go on with resume=<run directory>"
            )
        return self._failure

    def end(self) -> None:
        """End the process, if it still runs."""
        self.process.kill()
        self.process.communicate()
        self.reports.close()

    def _read(self) -> None:
        try:
            while self._failure is None and self.reports.poll():
                kind, text = self.reports.recv()
                self.is_ready = True
                if kind is not None:
                    self._failure = kind(f"{self.name}: {text}")
        except EOFError:
            return


@contextmanager
def joined(stage: Stage, context: StageContext, trainer: pl.Trainer) -> Iterator[None]:
    """Within the block, `trainer` finds its other ranks, which run the same stage.

    Args:
        stage: a record of plain values; the other ranks call an equal one.
        context: where rank 0 works.
        trainer: about to train; on one device, nothing happens.

    Raises:
        UserError: what a user can mend, on whichever rank it was met first.
        RankError: for any other error of another rank.
    """
    if not isinstance(trainer.strategy, ParallelStrategy):
        yield
        return
    reports = _to_rank_zero.get(None)
    # Lightning sets the list of callbacks, so that its type does not know it.
    callbacks: list[pl.Callback] = vars(trainer)["callbacks"]
    callbacks.append(_Termination(is_rank_zero=reports is None))
    if reports is not None:
        reports.send(READY)
        yield
        return
    with _told_to_lightning(trainer.num_devices):
        others: list[Rank] = []
        trained = threading.Event()
        try:
            for number in range(1, trainer.num_devices):
                others.append(Rank(number, trainer.num_devices, stage, context))
            _wait_until_built(others)
            threading.Thread(target=_free_rank_zero, args=(others, trained), daemon=True).start()
            try:
                yield
            except UserError:
                raise
            except Exception as error:
                # Rank 0 mostly meets another's failure as a connection that was closed.
                if failure := _first_failure(others, UNTIL_TOLD):
                    raise failure from error
                raise
            trained.set()
            _leave_group()
            if failure := _first_failure(others, UNTIL_ENDED):
                raise failure
        finally:
            trained.set()
            for rank in others:
                rank.end()
            _leave_group()


def serve() -> None:
    """Be another rank: read what to do from stdin, do it in silence, report how it went."""
    reports = Connection(os.dup(1), readable=False)
    os.dup2(2, 1)
    # Ctrl-C reaches every process of a terminal; rank 0 takes it and ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    stage, name, output, scratch = pickle.load(sys.stdin.buffer)
    threading.Thread(target=_end_with_rank_zero, daemon=True).start()
    _to_rank_zero.set(reports)
    try:
        stage(StageContext(name, output, scratch, FileTracker(None), Console(quiet=True)))
        _leave_group()
    except BaseException as error:
        report: Any = (RankError, f"\n{traceback.format_exc()}")
        if isinstance(error, UserError):
            report = (type(error), str(error))
        reports.send(report)
        # At once: the others learn of it when the connections close.
        os._exit(1)
    # Nothing is left to do, and threads of torch that still run abort an interpreter that ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class _Termination(pl.Callback):
    """SIGTERM ends a run of several ranks as Ctrl-C does.

    Lightning's own handler calls a collective, wherever the ranks happen to be.
    """

    def __init__(self, *, is_rank_zero: bool) -> None:
        self.handler = signal.default_int_handler if is_rank_zero else signal.SIG_IGN

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take Lightning's handler away; it puts back the one before it when training ends."""
        signal.signal(signal.SIGTERM, self.handler)


@contextmanager
def _told_to_lightning(size: int) -> Iterator[None]:
    """Within the block, Lightning takes this process for rank 0 of `size` that are there."""
    before = {name: os.environ.get(name) for name in VARIABLES}
    threads = torch.get_num_threads()
    os.environ |= {"LOCAL_RANK": "0", "NODE_RANK": "0", "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port())}
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _wait_until_built(others: Sequence[Rank]) -> None:
    """Wait for the ranks to have built their stage: a failure there would block a rendezvous."""
    while waiting := [rank for rank in others if not rank.is_ready]:
        wait([rank.reports for rank in waiting], timeout=0.1)
        if failure := _first_failure(waiting, seconds=0):
            raise failure


def _first_failure(others: Sequence[Rank], seconds: float) -> Exception | None:
    """Return the first failure of a rank; None when all have ended or the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        running = any(rank.process.poll() is None for rank in others)
        for rank in others:
            if failure := rank.failure():
                return failure
        if not running or time.monotonic() >= deadline:
            return None
        time.sleep(0.05)


def _free_rank_zero(others: Sequence[Rank], trained: threading.Event) -> None:
    """End rank 0 when another has failed and rank 0 still waits for it long afterwards."""
    while not trained.wait(1.0):
        if not any(rank.process.poll() for rank in others) or trained.wait(UNTIL_FREED):
            continue
        failure = _first_failure(others, seconds=0)
        for rank in others:
            rank.process.kill()
        print(f"error: {' '.join(str(failure).split())}", file=sys.stderr, flush=True)
        os._exit(2 if isinstance(failure, UserError) else 1)


def _leave_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _end_with_rank_zero() -> None:
    # Not through `sys.stdin`, whose lock a thread may not hold when the interpreter ends.
    os.read(0, 1)
    os._exit(1)
