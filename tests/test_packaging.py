"""The wheel carries the config, and `stillhouse` works from any folder."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from commands import ROOT, run_here


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", str(folder)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_holds_both_packages_the_config_and_the_corpus(unpacked_wheel: Path) -> None:
    for name in (
        "stillhouse/conf/run.yaml",
        "stillhouse/conf/experiment/word_kd.yaml",
        "stillhouse/data/corpora/king_james.txt.xz",
        "stillhouse_kernels/__init__.py",
    ):
        assert (unpacked_wheel / name).is_file()
    recipes = {p.name for p in (unpacked_wheel / "stillhouse/conf/experiment").iterdir()}
    assert recipes == {p.name for p in (ROOT / "conf/experiment").iterdir()}


def test_the_installed_command_runs_from_any_folder(unpacked_wheel: Path, tmp_path: Path) -> None:
    code = "import sys; from stillhouse.cli import config_folder, main; "
    code += "print(config_folder(), flush=True); sys.argv[0] = 'stillhouse'; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "debug=tiny", "tracking=csv", "stop_after=tokenizer"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(unpacked_wheel),
            "STILLHOUSE_CACHE": str(tmp_path / "cache"),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(unpacked_wheel / "stillhouse" / "conf"))
    assert list(tmp_path.glob("outputs/word_kd/*/stages/tokenizer/tokenizer.json"))


def test_help_lists_every_recipe_with_a_line_and_a_duration(capfd) -> None:
    done = run_here(capfd, "--help")
    assert done.code == 0
    for path in (ROOT / "conf" / "experiment").glob("*.yaml"):
        (line,) = (row for row in done.out.splitlines() if row.startswith(f"  {path.stem} "))
        assert line.endswith(")")
        assert len(line) > len(path.stem) + 20


def test_cfg_job_shows_what_would_run(capfd) -> None:
    done = run_here(capfd, "--cfg", "job", "--resolve", "debug=tiny", "trainer.max_steps=7")
    assert done.code == 0, done.err
    assert "path: stages/teacher" in done.out
    assert done.out.count("max_steps: 7") == 3
    part = run_here(capfd, "--cfg", "job", "--package", "method")
    assert part.out.startswith("_target_: stillhouse.families.sequence.word_kd.word_kd\n")


def test_constraints_are_plain_pins() -> None:
    """pip takes no editable or local requirement as a constraint."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert len(pins) > 50
    assert [p for p in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9.]+", p)] == []
