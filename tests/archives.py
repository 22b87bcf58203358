"""Archives as tests make them, and what is left of them when they are refused."""

import hashlib
import io
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from stillhouse.errors import UserError

KEY = "stages.fetch.package"
WHEEL = {
    "toy/model.txt": "weights",
    "toy/code.py": "raise SystemExit",
    "toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
    "toy-1.0.dist-info/WHEEL": (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
    "toy-1.0.dist-info/RECORD": "",
}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_wheel(folder: Path, files: dict[str, str] = WHEEL) -> Path:
    path = folder / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


def make_tar(path: Path, *members: tuple[str, bytes | str, bytes]) -> Path:
    """Write members (name, content or what a link points to, tar's type of it)."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content, kind in members:
            member = tarfile.TarInfo(name)
            member.type = kind
            if isinstance(content, str):
                member.linkname = content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def local(archive: Path, **changes) -> dict:
    """Return the keys of an archive that was downloaded before."""
    known = {"name": "toy", "version": "1.0", "sha256": sha256(archive)}
    return known | {"archive_path": str(archive)} | changes


def text_of(folder: Path) -> dict[str, str]:
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: path.read_text() for name, path in sorted(found.items())}


def refusal(fetch: Callable[..., None], folder: Path, **keys) -> str:
    """Return the message of a fetch that is refused, and that left nothing behind."""
    with pytest.raises(UserError) as refused:
        fetch(folder, KEY, **keys)
    assert list(folder.iterdir()) == []
    assert "\n" not in str(refused.value)
    return str(refused.value)


def make_deb(folder: Path) -> Path:
    """Write a package with a file, a script and, as in Debian's own, an absolute link."""
    if shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    tree = folder / "tree"
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN" / "control").write_text(
        "Package: toy\nVersion: 1.0\nArchitecture: all\nMaintainer: t <t@t>\nDescription: toy\n"
    )
    (tree / "DEBIAN" / "preinst").write_text(f"#!/bin/sh\ntouch {folder}/ran\n")
    (tree / "DEBIAN" / "preinst").chmod(0o755)
    (tree / "usr/share/toy").mkdir(parents=True)
    (tree / "usr/share/toy/verses.txt").write_text("In the beginning")
    (tree / "usr/share/toy/config").symlink_to("/etc/toy")
    path = folder / "toy_1.0_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(tree), str(path)], check=True, capture_output=True)
    return path
