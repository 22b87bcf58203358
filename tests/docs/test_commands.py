"""The commands on the pages fail as the pages say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import ROOT, environment

CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[tuple[str, str]]:
    """Return the commands of a page in their order, each with what it writes to stderr."""
    text = "".join(CONSOLE.findall((ROOT / "docs" / f"{page}.md").read_text()))
    found = (part.partition("\n") for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:])
    return [(command, told) for command, _, told in found]


@pytest.mark.slow(minutes=5)
@pytest.mark.parametrize("page", ["troubleshooting", "sweeps", "many_gpus"])
def test_commands_tell_what_their_page_says(tmp_path: Path, page: str) -> None:
    """`…` stands for anything; the pages' machine has no GPU, and no interpreter of Triton."""
    run = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'run.py'))}"
    unset = ("LOCAL_RANK", "TRITON_INTERPRET")
    env = {k: v for k, v in environment(tmp_path / "cache").items() if k not in unset}
    env |= {"COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    wrong = []
    for command, expected in commands(page):
        done = subprocess.run(
            ["bash", "-c", command.replace("python run.py", run)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        pattern = ".*".join(map(re.escape, expected.split("…")))
        if not re.fullmatch(pattern, done.stderr) or done.returncode != (2 if expected else 0):
            wrong.append(f"$ {command}\n{done.stderr}exit code {done.returncode}\n")
    assert not wrong, "\n".join(wrong)
