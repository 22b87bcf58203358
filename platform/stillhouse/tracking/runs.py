"""The record of a run: `config.yaml`, `results.json`, `metrics.csv` in its directory.

`results.json` is a contract that `compare` and others read:

    {"recipe", "seed", "config_hash" (without the seed), "git", "status", "overrides",
     "stages": {name: {"status", "seconds", "metrics", "error"?}},
     "models": {role: {metric: number}}}
"""

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from stillhouse.config.essence import config_hash
from stillhouse.files import CONFIG, RESULTS, SERIES, write_json
from stillhouse.tracking.lineage import StageArtifact
from stillhouse.tracking.series import append_rows, read_series

# Role -> metric -> number.
Models = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first stage.

    Attributes:
        recipe: name of the recipe.
        seed: of the run.
        config_hash: hash of the config without its seed; equal for repeats.
        git: revision of the code, with `+` when files differ from it; None outside a checkout.
        folder: the run directory.
        name: of the run, unique within its group.
        group: the sweep, or the recipe for a single run.
        overrides: the command line's own keys.
        config: the resolved config.
        artifacts: what its stages make, or take from the cache, in their order.
        last_stage: of the recipe; a run is done when this one is.
    """

    recipe: str
    seed: int
    config_hash: str
    git: str | None
    folder: Path
    name: str
    group: str
    overrides: Sequence[str]
    config: Mapping[str, Any]
    artifacts: Sequence[StageArtifact]
    last_stage: str


def is_sweep() -> bool:
    """Whether the running job is one of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def describe_run(
    config: DictConfig, folder: Path, artifacts: Sequence[StageArtifact], last_stage: str
) -> RunInfo:
    """Collect what is known of a run."""
    sweeping = is_sweep()
    overrides = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return RunInfo(
        recipe=config.recipe,
        seed=config.seed,
        config_hash=config_hash(config),
        git=git_revision(),
        folder=folder,
        name=f"{folder.parent.name}/{folder.name}" if sweeping else folder.name,
        group=folder.parent.name if sweeping else config.recipe,
        overrides=overrides,
        config={str(k): v for k, v in resolved.items()},
        artifacts=artifacts,
        last_stage=last_stage,
    )


def git_revision() -> str | None:
    """Return the commit of the checkout that this code lies in, `+` appended when it is dirty."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if git("ls-files", "--error-unmatch", __file__) == "":
            return None
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class StageEntry:
    """What `results.json` says of one stage."""

    status: str = "running"
    seconds: float | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None

    def finish(self, *, status: str, seconds: float, metrics: Mapping[str, Any]) -> None:
        """Take the final numbers."""
        self.status, self.seconds, self.metrics = status, seconds, metrics


@dataclass
class RunRecord:
    """A run directory's files, kept up to date while the run goes on."""

    folder: Path
    info: RunInfo
    stages: dict[str, StageEntry] = field(default_factory=dict)
    models: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    status: str = "running"

    @classmethod
    def open(cls, folder: Path, info: RunInfo) -> "RunRecord":
        """Begin the record of a run; what an earlier attempt wrote is superseded stage by stage."""
        folder.mkdir(parents=True, exist_ok=True)
        before = read_results(folder) or {}
        stages = {name: StageEntry(**entry) for name, entry in before.get("stages", {}).items()}
        record = cls(folder, info, stages, before.get("models", {}))
        record.write()
        return record

    def write_config(self, config: DictConfig) -> None:
        """Write the resolved config."""
        resolved = OmegaConf.to_container(config, resolve=True)
        (self.folder / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(resolved)))

    @contextmanager
    def stage(self, name: str) -> Iterator[StageEntry]:
        """Keep the entry of one stage, also when it fails."""
        entry = self.stages[name] = StageEntry()
        self.write()
        try:
            yield entry
        except BaseException as error:
            entry.status = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
            entry.error = " ".join(f"{type(error).__name__}: {error}".split())
            self.status = entry.status
            self.write()
            raise
        self.write()

    def add_models(self, models: Mapping[str, Mapping[str, Any]]) -> None:
        """Take numbers about models, by role."""
        for role, numbers in models.items():
            self.models[role] = {**self.models.get(role, {}), **numbers}

    def finish(self, *, stopped_early: bool) -> None:
        """Mark the run as done, or as stopped where `stop_after` left stages out."""
        self.status = "stopped" if stopped_early else "done"
        self.write()

    def write(self) -> None:
        """Write `results.json`, whole or not at all."""
        stages = {
            name: {k: v for k, v in vars(entry).items() if k != "error" or v is not None}
            for name, entry in self.stages.items()
        }
        content = {
            "recipe": self.info.recipe,
            "seed": self.info.seed,
            "config_hash": self.info.config_hash,
            "git": self.info.git,
            "status": self.status,
            "overrides": list(self.info.overrides),
            "stages": stages,
            "models": self.models,
        }
        write_json(self.folder / RESULTS, content)

    def gather_series(self, folders: Sequence[Path]) -> None:
        """Write `metrics.csv` from the series that lie in the folders, where there are any."""
        path = self.folder / SERIES
        path.unlink(missing_ok=True)
        for folder in folders:
            if (folder / SERIES).exists():
                append_rows(path, read_series(folder / SERIES))


def read_results(folder: Path) -> dict[str, Any] | None:
    """Return the results of a run directory, or None where there are none that can be read."""
    try:
        return json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return None
