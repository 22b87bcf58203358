"""Artifacts: folders that stages hand on, whole or not at all.

A stage writes into a working folder; `publish` adds a manifest with the checksum of every file and
renames the folder into place. `find_damage` compares a folder with its manifest, so a file that was
cut short, edited or lost is seen before anything is built on it.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from stillhouse.files import MANIFEST, files_of, remove, sha256_of, write_json

Number = float | int


@dataclass(frozen=True)
class Manifest:
    """What is known of a finished stage: who made it, in how long, what it measured, what it holds.

    Attributes:
        fingerprint: hash of everything that decides the content.
        seconds: wall time of making it.
        created: UTC time, ISO 8601.
        metrics, models: the stage's `StageResult`.
        files: relative path -> sha256.
    """

    fingerprint: str
    seconds: float
    created: str
    metrics: Mapping[str, Number]
    models: Mapping[str, Mapping[str, Number]]
    files: Mapping[str, str]


def publish(
    folder: Path,
    destination: Path,
    *,
    fingerprint: str,
    seconds: float,
    metrics: Mapping[str, Number],
    models: Mapping[str, Mapping[str, Number]],
) -> Manifest:
    """Seal `folder` with a manifest and move it to `destination`, replacing what stood there."""
    manifest = Manifest(
        fingerprint=fingerprint,
        seconds=round(seconds, 2),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        metrics=dict(metrics),
        models={role: dict(numbers) for role, numbers in models.items()},
        files={path.relative_to(folder).as_posix(): sha256_of(path) for path in files_of(folder)},
    )
    write_json(folder / MANIFEST, asdict(manifest))
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Renames only: whoever looks meanwhile finds the old artifact, none or the new one, no half.
    old = destination.with_name(f"{destination.name}.old")
    remove(old)
    if destination.exists():
        os.replace(destination, old)
    os.replace(folder, destination)
    remove(old)
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of an artifact, or None where there is none that can be read."""
    try:
        return Manifest(**json.loads((folder / MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def find_damage(folder: Path) -> str | None:
    """Say in a few words how `folder` differs from its manifest; None when it is whole."""
    manifest = read_manifest(folder)
    if manifest is None:
        return f"{MANIFEST} is missing or cannot be read"
    for name, digest in manifest.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"the checksum of {name} differs from the manifest's"
    return None
