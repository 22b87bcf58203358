"""Reading a finished run: its config, its numbers, and where its models lie."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from stillhouse.config.signatures import MODEL_FILES
from stillhouse.errors import UserError, did_you_mean
from stillhouse.files import CONFIG, RESULTS
from stillhouse.tracking.gather import Loader
from stillhouse.tracking.runs import read_results

# What the resolved config of a run says for `${artifact:<stage>}`.
ARTIFACT = "stages/"
PRODUCT = "student"


@dataclass(frozen=True)
class FinishedRun:
    """A run that is done, as its directory tells it.

    Attributes:
        folder: the run directory.
        config: the resolved config; artifacts are named `stages/<stage>`.
        results: the content of `results.json`.
    """

    folder: Path
    config: Mapping[str, Any]
    results: Mapping[str, Any]

    @property
    def recipe(self) -> str:
        """Name of the recipe."""
        return self.config["recipe"]

    @property
    def models(self) -> dict[str, str]:
        """Role -> path of its model as the config names it; roles set to null are left out."""
        return {role: path for role, path in self.config["models"].items() if path is not None}

    @property
    def stages(self) -> dict[str, Mapping[str, Any]]:
        """Name -> node of every stage in order; stages set to null are left out."""
        return {name: node for name, node in self.config["stages"].items() if node is not None}

    def role(self, name: str | None) -> str:
        """Return a role of the run, `name` or else that of its product.

        Raises:
            UserError: when there is no such role, or no product.
        """
        role = name if name is not None else self.config["product"]
        if role is None:
            raise UserError(
                f"role: the recipe {self.recipe} names no product; choose a model with "
                f"role=<role>; its models are {', '.join(self.models)}"
            )
        if role not in self.models:
            raise UserError(
                f"role={role}: the run has no such model; its models are "
                f"{', '.join(self.models)}{did_you_mean(role, self.models)}"
            )
        return role

    def stage_of(self, path: Any) -> str | None:
        """Return the stage whose artifact a value of the config names; None for anything else."""
        name = path.removeprefix(ARTIFACT) if isinstance(path, str) else None
        return name if name in self.stages and path == f"{ARTIFACT}{name}" else None

    def model(self, role: str) -> str:
        """Return where the model of a role lies: a folder, or an id of the hub as it is.

        The product is read from `student/`, which stays where the stages' artifacts are cleared.

        Raises:
            UserError: when the folder is gone or holds no model.
        """
        path, kept = self.models[role], self.folder / PRODUCT
        if self.stage_of(path) is None:
            return model_path(path, key=f"models.{role}")
        is_product = role == self.config["product"] and kept.is_dir()
        folder = kept if is_product else Path(self.located(path))
        if not any((folder / name).is_file() for name in MODEL_FILES):
            raise UserError(
                f"role {role}: the folder {folder} has no {MODEL_FILES[0]}; expected a model, as "
                f"save_pretrained writes it; {self._made_anew()}"
            )
        return str(folder)

    def located(self, node: Any) -> Any:
        """Copy a node of the config, artifacts as paths into the run directory.

        Raises:
            UserError: when an artifact is gone.
        """
        if isinstance(node, Mapping):
            return {key: self.located(value) for key, value in node.items()}
        if isinstance(node, list):
            return [self.located(value) for value in node]
        if self.stage_of(node) is None:
            return node
        place = self.folder / node
        if place.is_symlink() and not place.exists():
            raise UserError(
                f"run={self.folder}: {node} leads to {place.readlink()}, which is gone, perhaps "
                f"because the cache was cleaned; {self._made_anew()}"
            )
        if not place.exists():
            raise UserError(f"run={self.folder}: it has no {node} any more; {self._made_anew()}")
        return str(place)

    def stages_behind(self, stage: str) -> list[str]:
        """Return a stage and those whose artifacts it uses, directly or not, in their order."""
        found, waiting = {stage}, [stage]
        while waiting:
            named = {self.stage_of(text) for _, text in texts_of(self.stages[waiting.pop()])}
            waiting += [name for name in named if name is not None and name not in found]
            found |= {name for name in named if name is not None}
        return [name for name in self.stages if name in found]

    def _made_anew(self) -> str:
        return f"make it anew with: python run.py resume={self.folder}"


def read_run(config: DictConfig) -> FinishedRun:
    """Read the run directory that a job's `run` names.

    Raises:
        UserError: when the key has no value, or the folder holds no run or none that is done.
    """
    if OmegaConf.is_missing(config, "run"):
        raise UserError("run: name a run directory, such as run=outputs/word_kd/<time>")
    folder = Path(config.run).expanduser()
    results = read_results(folder)
    if not (folder / CONFIG).is_file() or results is None:
        raise UserError(_no_run(config.run, folder))
    status = results.get("status")
    if status != "done":
        raise UserError(
            f"run={config.run}: its status is {status}; expected a run that is done; go on with "
            f"it: python run.py resume={config.run}"
        )
    try:
        content = yaml.load((folder / CONFIG).read_text(), Loader)
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict) or not {"recipe", "models", "stages"} <= content.keys():
        raise UserError(f"run={config.run}: its {CONFIG} cannot be read as the config of a run")
    return FinishedRun(folder, content, results)


def _no_run(given: str, folder: Path) -> str:
    wanted = (
        f"expected a run directory, with {CONFIG} and {RESULTS} in it, such as "
        "outputs/<recipe>/<time>"
    )
    if not folder.is_dir():
        beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
        near = did_you_mean(folder.name, [p.name for p in beside])
        return f"run={given}: there is no such folder; {wanted}{near}"
    inside = [*folder.glob(f"*/{RESULTS}"), *folder.glob(f"*/*/{RESULTS}")]
    if not inside:
        return f"run={given}: the folder is no run directory; {wanted}"
    newest = max(inside, key=lambda path: path.stat().st_mtime).parent
    return f"run={given}: the folder holds runs, the newest is run={newest}; {wanted}"


def texts_of(node: Any, key: str = "") -> Iterable[tuple[str, str]]:
    """Yield (key, text) of every text in a node, at any depth."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from texts_of(value, str(name))
    elif isinstance(node, list):
        for value in node:
            yield from texts_of(value, key)
    elif isinstance(node, str):
        yield key, node


def is_hub_id(path: str) -> bool:
    """Whether a model's path is an id of the hub and no folder of this machine."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") > 1
    return not looks_local and not Path(path).exists()


def model_path(path: str, *, key: str) -> str:
    """Return the path of a model from outside the run, which may be an id of the hub.

    Raises:
        UserError: when it is a folder that is not there or holds no model; `key` is named.
    """
    if is_hub_id(path):
        return path
    folder = Path(path).expanduser()
    if not folder.exists():
        raise UserError(f"{key}={path}: there is no such folder")
    if not any((folder / name).is_file() for name in MODEL_FILES):
        raise UserError(
            f"{key}={path}: the folder has no {MODEL_FILES[0]}; expected a model saved with "
            "save_pretrained, for example the student/ of a run directory"
        )
    return str(folder)


def as_texts(value: Any, *, key: str, example: str) -> list[str]:
    """Return a list of texts that the command line gave, a single one as a list of one.

    Raises:
        UserError: for anything else, and for an empty list.
    """
    plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else [value]
    if not isinstance(plain, list) or not plain or not all(isinstance(t, str) for t in plain):
        raise UserError(f"{key}={value}: expected a list of texts, such as '{key}=[{example}]'")
    return plain
