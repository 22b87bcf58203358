"""What the command line does with its streams."""

import subprocess
from pathlib import Path

from commands import command_line, environment


def test_a_reader_that_has_had_enough_ends_the_command_in_silence(tmp_path: Path) -> None:
    with subprocess.Popen(
        command_line("--help"),
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait() == 141
