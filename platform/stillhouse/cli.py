"""The command line: `python run.py …` and `stillhouse …`; imports nothing heavy at module level.

`hydra.main` composes the config and hands it to the job that it names. Everything that can go wrong
on the way is caught outside of it and told in one line (exit code 2) where the user can mend it;
what is our own fault keeps its traceback (exit code 1).
"""

import os
import platform
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from stillhouse.config import arguments

INTERRUPTED = 130
NOT_READ = 141


def config_folder() -> Path:
    """Return the absolute folder of the config groups: the packaged one, else the checkout's."""
    packaged = Path(__file__).parent / "conf"
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "conf"


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 2 something to mend, 1 a fault of ours."""
    try:
        code = run(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read what we print, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = NOT_READ
    sys.exit(code)


def run(argv: list[str]) -> int:
    """Run the command line `argv` and return the exit code."""
    try:
        if arguments.wants_help(argv):
            print(arguments.help_text(config_folder()))
            return 0
        from stillhouse.config import preflight

        argv = preflight.prepare(argv, config_folder())
        if arguments.wants_config(argv):
            print(preflight.shown_config(argv, config_folder()), end="")
            return 0
        try:
            _hydra(argv)
        finally:
            unfinished = _tell_of_jobs(argv)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except Exception as error:
        return _tell(error, argv)
    return 2 if unfinished else 0


def _tell_of_jobs(argv: list[str]) -> bool:
    """Say which jobs of a sweep did not come to their end; return whether there are any."""
    if not {"-m", "--multirun"} & set(argv):
        return False
    from stillhouse.tracking import ledger

    unfinished = [ledger.tell_unfinished(sweep) for sweep in ledger.taken()]
    return any(unfinished)


def _tell(error: Exception, argv: list[str]) -> int:
    """Print an error, in one line where the user can mend it; return the exit code."""
    from stillhouse.config import messages

    line = messages.one_line(error, argv, config_folder())
    if line is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
        traceback.print_exc()
    if line is None:
        return 1
    print(f"error: {line}", file=sys.stderr)
    return 2


def _hydra(argv: list[str]) -> None:
    import hydra

    from stillhouse.config import messages

    decorated = hydra.main(version_base="1.3", config_path=str(config_folder()), config_name="run")(
        run_job
    )
    argv_before, sys.argv = sys.argv, [sys.argv[0], *argv]
    stderr_before, sys.stderr = sys.stderr, messages.WithoutHydrasOwn(sys.stderr)
    users_own = os.environ.get("HYDRA_FULL_ERROR")
    # Hydra would print and exit by itself; so it raises, and the error is told outside.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        decorated()
    finally:
        sys.argv, sys.stderr = argv_before, stderr_before
        if users_own is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = users_own


def run_job(config: Any) -> Any:
    """Run one composed job: the `_target_` of the primary config.

    In a sweep, a failure goes into its ledger, so that the other jobs go on.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from hydra.utils import get_method

    from stillhouse.config import messages
    from stillhouse.schema import register_schemas
    from stillhouse.stages.workspace import register_resolvers

    # A launcher may run the job in a process that has not come through `run`.
    register_schemas()
    register_resolvers()
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    job = get_method(config._target_)
    if hydra_config.mode != RunMode.MULTIRUN:
        try:
            return job(config, folder)
        except Exception:
            _leave_nothing_begun(folder)
            raise
    from stillhouse.tracking.ledger import Job, is_held

    sweep = Path(hydra_config.sweep.dir).resolve()
    place = Path(os.path.relpath(folder, sweep)).as_posix()
    process = f"{platform.node()}:{os.getpid()}"
    entry = Job(int(hydra_config.job.num), list(hydra_config.overrides.task), place, process)
    if not config.plan:
        if is_held(folder):  # a cluster's jobs outlive the command that gave them to it
            print(f"job {entry.number}: another process works on it; it is left alone")
            return None
        entry.write(sweep)
    try:
        job(config, folder)
    except Exception as error:
        line = messages.one_line(error, [], config_folder())
        if line is None:
            traceback.print_exc()
        reason = line or f"{type(error).__name__}: {error}"
        entry.failed(reason).write(sweep)
        print(f"job {entry.number} failed: {reason}", file=sys.stderr)
    return None


def _leave_nothing_begun(folder: Path) -> None:
    """Remove a run directory that holds nothing but Hydra's own files: the run never began."""
    if (folder / ".hydra").is_dir() and [p.name for p in folder.iterdir()] == [".hydra"]:
        shutil.rmtree(folder)
