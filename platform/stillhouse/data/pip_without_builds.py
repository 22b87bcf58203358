"""Run as a script: pip, with no code of an archive run.

To download a source archive, pip asks the archive's build backend for its metadata, and so runs it.
Here pip is given another interpreter for its subprocesses: this script again, which answers for
every backend with the name and version that were asked for. A question that it does not know makes
pip fail; nothing falls back on the archive's own code.

    python pip_without_builds.py <name> <version> <arguments of pip> …
"""

import json
import os
import runpy
import shlex
import sys
import tempfile
from pathlib import Path

# As `pyproject_hooks`, by which pip asks a backend, calls its files.
QUESTION, REPLY = "input.json", "output.json"


def run_pip(name: str, version: str, *arguments: str) -> None:
    """Run pip in this process, with a script in the place of its interpreter."""
    with tempfile.TemporaryDirectory() as folder:
        interpreter = Path(folder, "python")
        command = [sys.executable, str(Path(__file__).resolve()), "--answer", name, version]
        interpreter.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        interpreter.chmod(0o755)
        sys.executable = str(interpreter)
        # By default, older versions ask an archive without a pyproject.toml otherwise.
        os.environ["PIP_USE_PEP517"] = "1"
        sys.argv = ["pip", *arguments]
        runpy.run_module("pip", run_name="__main__")


def answer(name: str, version: str, script: str, hook: str, folder: str) -> None:
    """Answer one question: no requirements, and the least metadata that there can be.

    Args:
        name, version: of the package.
        script: by which pip would have asked the backend; it is not run.
        hook: what is asked, as PEP 517 names it.
        folder: of question and reply.
    """
    given = json.loads(Path(folder, QUESTION).read_text())["kwargs"]
    reply: list[str] | str = []
    if hook == "prepare_metadata_for_build_wheel":
        reply = f"{name.replace('-', '_')}-{version}.dist-info"
        metadata = Path(given["metadata_directory"], reply)
        metadata.mkdir()
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (metadata / "METADATA").write_text(text)
    elif hook != "get_requires_for_build_wheel":
        sys.exit(f"{script}: {hook} would run the archive's code")
    Path(folder, REPLY).write_text(json.dumps({"return_val": reply}))


if __name__ == "__main__":
    # A script's folder comes first on the path, and this one's modules are not pip's.
    sys.path[:] = [path for path in sys.path if Path(path) != Path(__file__).parent]
    if sys.argv[1] == "--answer":
        answer(*sys.argv[2:])
    else:
        run_pip(*sys.argv[1:])
