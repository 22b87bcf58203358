"""Files of runs and artifacts: names, checksums, and writing them whole or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

CONFIG = "config.yaml"
RESULTS = "results.json"
SERIES = "metrics.csv"
MANIFEST = "manifest.json"
# Held by the process that works in a run directory.
LOCK = ".lock"
# Stage -> address of its W&B run, where it was online.
WANDB_URLS = "wandb_urls.json"


def sha256_of(path: Path) -> str:
    """Return the hex sha256 of a file's content; a file that did not change is read once."""
    known = path.stat()
    return _sha256_of(path.resolve(), known.st_size, known.st_mtime_ns, known.st_ino)


@lru_cache(maxsize=4096)
def _sha256_of(path: Path, size: int, modified: int, inode: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_json(content: object) -> str:
    """Return the hex sha256 of a value's canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def content_hash(path: Path) -> str:
    """Hash a file, or a folder's files with their relative names."""
    if path.is_file():
        return sha256_of(path)
    return hash_json({f.relative_to(path).as_posix(): sha256_of(f) for f in files_of(path)})


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the files under `folder` in a fixed order, the manifest left out."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() != MANIFEST:
            yield path


def remove(path: Path) -> None:
    """Remove a folder, a file or a link, if it is there; a link's target stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.is_dir():
        shutil.rmtree(path)


def write_json(path: Path, content: object) -> None:
    """Write JSON whole or not at all: to a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
