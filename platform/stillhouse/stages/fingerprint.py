"""Fingerprints: a stage is done again exactly when something that decides its result has changed.

A fingerprint hashes the stage's resolved node (artifacts replaced by their fingerprints, outside
paths by their content, keys that cannot change a result left out) and the source of every project
module that the node's `_target_`s reach by imports. Sources are read, not imported, so that a plan
costs no heavy import.
"""

import ast
import glob
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from stillhouse.files import content_hash, hash_json, sha256_of

# Raise it when the layout of artifacts changes: every cached stage is then made anew.
FORMAT_VERSION = 1

# How a run is told and checked does not decide what it computes.
TELLING_PACKAGES = ("stillhouse.tracking", "stillhouse.config")
PROJECT_PACKAGES = ("stillhouse", "stillhouse_kernels")

# Where, how visibly and with how many hands a stage runs does not decide what it makes.
NEUTRAL_KEYS = frozenset(
    {
        "accelerator",
        "checkpoint_every_n_steps",
        "enable_model_summary",
        "log_every_n_steps",
        "num_workers",
        "pin_memory",
        "profiler",
    }
)


def fingerprint(node: dict[str, Any]) -> str:
    """Hash a stage's resolved node, in which artifacts already are fingerprints."""
    essence = {
        "format": FORMAT_VERSION,
        "node": _hash_paths(without_neutral_keys(node)),
        "sources": {name: source_hash(name) for name in sorted(set(targets_of(node)))},
    }
    return hash_json(essence)


def without_neutral_keys(node: Any) -> Any:
    """Copy a node without the keys that cannot change a result.

    Of `devices` the number stays: it multiplies the global batch. Which ones they are does not.
    """
    if isinstance(node, dict):
        kept = {k: without_neutral_keys(v) for k, v in node.items() if k not in NEUTRAL_KEYS}
        if isinstance(kept.get("devices"), list):
            kept["devices"] = len(kept["devices"])
        return kept
    if isinstance(node, list):
        return [without_neutral_keys(v) for v in node]
    return node


def targets_of(node: Any) -> Iterator[str]:
    """Yield every `_target_` of a node, at any depth."""
    if isinstance(node, dict):
        if isinstance(node.get("_target_"), str):
            yield node["_target_"]
        for value in node.values():
            yield from targets_of(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets_of(value)


def _hash_paths(node: Any, key: str = "") -> Any:
    """Replace a path to something outside by the hash of what lies there."""
    if isinstance(node, dict):
        return {k: _hash_paths(v, k) for k, v in node.items()}
    if isinstance(node, list):
        return [_hash_paths(v, key) for v in node]
    names_a_path = isinstance(node, str) and (os.sep in node or key.endswith("path"))
    if names_a_path and (place := _existing(node)) is not None:
        return f"content:{content_hash(place)}"
    if names_a_path and glob.has_magic(node):
        files = sorted(glob.glob(os.path.expanduser(node), recursive=True))
        return {"glob": node, "files": {f: content_hash(Path(f)) for f in files}}
    return node


def _existing(text: str) -> Path | None:
    """Return the path that a text names, if something lies there."""
    try:
        place = Path(text).expanduser()
        return place if place.exists() else None
    except (OSError, RuntimeError):  # longer than a name may be, or no such home: not a path
        return None


@cache
def source_hash(target: str) -> str:
    """Hash the sources that a dotted `_target_` reaches; of an installed library, its version."""
    package = target.partition(".")[0]
    if package in PROJECT_PACKAGES:
        module = _module_of(target)
        sources = {name: sha256_of(path) for name, path in sorted(_closure(module).items())}
        return hash_json({"sources": sources, "data": _data_beside(module)})
    distributions = importlib.metadata.packages_distributions().get(package)
    if distributions:
        return f"{distributions[0]}=={importlib.metadata.version(distributions[0])}"
    spec = importlib.util.find_spec(package)
    return sha256_of(Path(spec.origin)) if spec and spec.origin else package


@cache
def _root(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent.parent


def _source(module: str) -> Path | None:
    """Return the file of a project module, or None where the name is no module."""
    base = _root(module.partition(".")[0]).joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _module_of(dotted: str) -> str:
    """Return the longest prefix of a dotted name that is a project module."""
    while "." in dotted and _source(dotted) is None:
        dotted = dotted.rpartition(".")[0]
    return dotted


def _closure(module: str) -> dict[str, Path]:
    """Return every project module that importing `module` imports, itself and its parents too."""
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            part = ".".join(parts[:depth])
            path = _source(part)
            telling = part.startswith(TELLING_PACKAGES)
            if part not in found and path is not None and not telling:
                found[part] = path
                waiting.extend(_imports(part, path))
    return found


def _data_beside(module: str) -> dict[str, str]:
    """Hash the data files that ship with a module: those of its folder that begin with its name."""
    source = _source(module)
    assert source is not None
    beside = source.parent.glob(f"{source.stem}.*")
    return {path.name: sha256_of(path) for path in sorted(beside) if path.suffix != ".py"}


@cache
def _imports(module: str, path: Path) -> tuple[str, ...]:
    """Return the project modules that a source file imports, at any depth of its code."""
    names: list[str] = []
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                anchor = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*anchor, base] if base else anchor)
            names += [f"{base}.{alias.name}" for alias in node.names]
    return tuple(_module_of(n) for n in names if n.partition(".")[0] in PROJECT_PACKAGES)
