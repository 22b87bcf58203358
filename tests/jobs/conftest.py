"""One tiny run for all tests of the jobs that read runs, and copies of it to break."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import TINY, only_run

from stillhouse import cli


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the tiny run's `outputs` and `cache`."""
    folder = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("STILLHOUSE_CACHE", str(folder / "cache"))
        assert cli.run([*TINY, "experiment=word_kd"]) == 0
        before = _times(folder)
        yield folder
    assert _times(folder) == before, "a job changed what it only reads"


def _times(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="session")
def run(place: Path) -> Path:
    """The tiny run's directory."""
    return only_run(place / "outputs")


@pytest.fixture
def here(tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, empty."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("STILLHOUSE_CACHE", str(run.parents[2] / "cache"))
    return folder


@pytest.fixture
def copy(tmp_path: Path, run: Path) -> Path:
    """A copy of the tiny run; shared stages are links into the same cache."""
    return Path(shutil.copytree(run, tmp_path / "copy", symlinks=True))
