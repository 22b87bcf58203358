"""Finding run directories and reading them as records."""

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stillhouse.errors import UserError, did_you_mean
from stillhouse.files import CONFIG, RESULTS, SERIES
from stillhouse.tracking.leavings import Leavings, read_leavings
from stillhouse.tracking.runs import read_results
from stillhouse.tracking.series import read_series

# The C loader reads a config ten times faster; not every build of PyYAML has it.
Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A stage's error can be a whole tensor's text.
LONGEST_ERROR = 200


@dataclass(frozen=True)
class Run:
    """A finished run, as its directory tells it, or W&B.

    Attributes:
        name: how it is told: the run directory, or its place in W&B.
        folder: the run directory; None where W&B alone tells of it.
        recipe: name of the recipe.
        config_hash: equal for runs that differ in their seed only.
        seed: of the run.
        overrides: the command line's own keys.
        models: role -> metric -> number.
        config: the resolved config; empty where it cannot be read.
        series: rows (stage, step, metric, value).
        written: time at which its results were last written, seconds since the epoch.
        leavings: what there is to be looked at.
    """

    name: str
    folder: Path | None
    recipe: str
    config_hash: str
    seed: int
    overrides: tuple[str, ...]
    models: Mapping[str, Mapping[str, float]]
    config: Mapping[str, Any]
    series: tuple[tuple[str, int, str, float], ...]
    written: float
    leavings: Leavings


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read the run directories; return the finished runs, and a line for each that is left out."""
    runs, left_out = [], []
    for folder in folders:
        run = _read_run(folder)
        if isinstance(run, Run):
            runs.append(run)
        else:
            left_out.append(f"{folder} is left out: {run}")
    return runs, left_out


def find_folders(entries: Sequence[str]) -> list[Path]:
    """Return the run directories that the entries name, each once.

    Args:
        entries: run directories, folders whose direct children are run directories, or globs.

    Raises:
        UserError: for an entry that leads to no run directory.
    """
    found: dict[Path, Path] = {}
    for entry in entries:
        folders = list(_folders_of(entry))
        if not folders:
            raise UserError(_nothing_there(entry))
        for folder in folders:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _folders_of(entry: str) -> Iterator[Path]:
    path = os.path.expanduser(entry)
    # A folder may have brackets in its name: what is there by that very name is no pattern.
    paths = [path] if os.path.exists(path) else glob.glob(path, recursive=True)
    for folder in sorted(map(Path, paths), key=_natural):
        if (folder / RESULTS).is_file():
            yield folder
        elif folder.is_dir():
            inside = sorted(folder.iterdir(), key=_natural)
            yield from (child for child in inside if (child / RESULTS).is_file())


def _natural(path: Path) -> list[tuple[int, str]]:
    """Order a sweep's jobs 2 before 10."""
    pieces = re.findall(r"\d+|\D+", str(path))
    return [(int(p), "") if p.isdigit() else (-1, p) for p in pieces]


def _nothing_there(entry: str) -> str:
    path = Path(entry).expanduser()
    wanted = "a run directory, a folder of run directories or a glob of them"
    if path.exists() or glob.glob(str(path), recursive=True):
        return (
            f"runs: {entry} holds no run: there is no {RESULTS} in it or one folder below; "
            f"expected {wanted}, such as outputs/word_kd/*"
        )
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    return (
        f"runs: {entry} matches nothing in {Path.cwd()}; expected {wanted}, such as "
        f"outputs/word_kd/*{did_you_mean(path.name, beside)}"
    )


def _read_run(folder: Path) -> Run | str:
    """Return the run, or the reason why it cannot be compared."""
    results = read_results(folder)
    try:
        assert results is not None
        if results["status"] != "done":
            return _what_happened(results)
        models = {role: numbers_of(metrics) for role, metrics in results["models"].items()}
        if not any(models.values()):
            return "it is done but has no numbers of models; did its evaluation run?"
        return Run(
            name=str(folder),
            folder=folder,
            recipe=results["recipe"],
            config_hash=results["config_hash"],
            seed=int(results["seed"]),
            overrides=tuple(results.get("overrides", ())),
            models=models,
            config=_read_config(folder / CONFIG),
            series=tuple(read_series(folder / SERIES)) if (folder / SERIES).is_file() else (),
            written=(folder / RESULTS).stat().st_mtime,
            leavings=read_leavings(folder),
        )
    except (AssertionError, AttributeError, KeyError, TypeError, ValueError):
        return f"its {RESULTS} cannot be read"


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return what of a role's metrics is a number."""
    return {
        name: value
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _what_happened(results: Mapping[str, Any]) -> str:
    """Tell a run's status, with the stage's error where there is one."""
    for name, stage in results.get("stages", {}).items():
        if stage.get("error"):
            error = stage["error"]
            shown = error if len(error) <= LONGEST_ERROR else f"{error[:LONGEST_ERROR]} …"
            return f"its status is {results['status']}; stage {name}: {shown}"
    return f"its status is {results['status']}"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(path.read_text(), Loader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}
