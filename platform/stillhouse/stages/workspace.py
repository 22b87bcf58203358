"""The workspace: where a run's artifacts lie, and what `${artifact:<stage>}` stands for.

`${artifact:<a>,<b>}` is that of the first of these stages that is not left out, so that a recipe
can go on from whatever came before. `${remaining:<steps>,<a>,<b>}` is what the stages a and b,
where they are not left out, leave of a number of optimiser steps.

The resolver is bound to a workspace by a context variable. Without one (`--cfg job --resolve`) it
gives the path that the artifact has in every run directory, whether or not it exists.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from stillhouse.errors import UserError, did_you_mean
from stillhouse.stages.fingerprint import fingerprint

# Keys of a stage's node that speak to the runner and not to the stage.
RUNNER_KEYS = ("shared",)

_reference: ContextVar[Callable[[str], str]] = ContextVar("artifact reference")


def register_resolvers() -> None:
    """Make `artifact`, `remaining` and `steps`, a share of a budget, known to OmegaConf."""
    OmegaConf.register_new_resolver("artifact", _resolve_artifact, replace=True)
    OmegaConf.register_new_resolver("steps", _part_of_steps, replace=True)
    OmegaConf.register_new_resolver("remaining", _remaining_steps, replace=True)


def _resolve_artifact(*stages: str, _root_: DictConfig) -> str:
    chosen = next((stage for stage in stages if _is_there(stage, _root_)), stages[-1])
    return _reference.get(_relative_path)(chosen)


def _part_of_steps(factor: float, steps: int) -> int:
    """Return a budget that follows another one, to the nearest step and one at least."""
    return max(1, round(factor * steps))


def _remaining_steps(steps: int, *stages: str, _root_: DictConfig) -> int:
    """Return what stages leave of a budget, one at least; a stage left out takes nothing of it.

    Raises:
        UserError: when they take more than there is.
    """
    taken = {s: int(_root_.stages[s].trainer.max_steps) for s in stages if _is_there(s, _root_)}
    # debug=… lays the same small number over the budget and over its parts.
    if sum(taken.values()) > steps and OmegaConf.select(_root_, "debug") is None:
        said = ", ".join(f"stages.{s}.trainer.max_steps={n}" for s, n in taken.items())
        raise UserError(
            f"trainer.max_steps={steps}: {said} take more; it is the budget of these stages and "
            "the last one together: raise it, or lower theirs"
        )
    return max(1, steps - sum(taken.values()))


def _is_there(stage: str, config: DictConfig) -> bool:
    return OmegaConf.select(config, f"stages.{stage}") is not None


def _relative_path(stage: str) -> str:
    return f"stages/{stage}"


@contextmanager
def references(meaning: Callable[[str], str]) -> Iterator[None]:
    """Within the block, `${artifact:x}` resolves to `meaning("x")`."""
    token = _reference.set(meaning)
    try:
        yield
    finally:
        _reference.reset(token)


@dataclass(frozen=True)
class Workspace:
    """A run's folders and its stages.

    Attributes:
        run: the run directory.
        cache: the content-addressed cache that runs share.
        config: the composed config, unresolved.
    """

    run: Path
    cache: Path
    config: DictConfig
    _fingerprints: dict[str, str] = field(default_factory=dict, repr=False)

    @property
    def stages(self) -> list[str]:
        """Names of the recipe's stages in their order; a stage set to null is left out."""
        return [name for name, node in self.config.stages.items() if node is not None]

    def artifact(self, stage: str) -> Path:
        """Return the path of a stage's artifact, the same in every run."""
        return self.run / "stages" / stage

    def shared(self, stage: str) -> bool:
        """Whether a stage's artifact lives in the cache: made on demand, once for all runs."""
        return bool(self.config.stages[stage].get("shared", False))

    def kind(self, stage: str) -> str:
        """Return the name of a stage's class."""
        return self.config.stages[stage]["_target_"].rpartition(".")[2]

    def home(self, stage: str) -> Path:
        """Return the folder that really holds a stage's artifact."""
        if self.shared(stage):
            return self.cache / f"{stage}-{self.fingerprint(stage)[:20]}"
        return self.artifact(stage)

    def scratch(self, stage: str) -> Path:
        """Return the folder in which a stage works until it is done; it survives a kill.

        A shared stage works beside its place in the cache, so that whoever needs it next goes on
        where a killed run stopped.
        """
        if self.shared(stage):
            home = self.home(stage)
            return home.with_name(f"{home.name}.work")
        return self.run / "work" / stage

    def node(self, stage: str) -> dict[str, Any]:
        """Return a stage's resolved node, artifacts as paths, without the runner's own keys."""
        with references(lambda name: str(self.artifact(self._known(name, stage)))):
            node = self._resolve(stage)
        return {k: v for k, v in node.items() if k not in RUNNER_KEYS}

    def fingerprint(self, stage: str) -> str:
        """Return the hash of everything that decides a stage's result, computed once."""
        if stage not in self._fingerprints:
            self._fingerprints[stage] = self._fingerprint(stage)
        return self._fingerprints[stage]

    def _fingerprint(self, stage: str) -> str:
        with references(lambda name: f"artifact {self.fingerprint(self._known(name, stage))}"):
            node = self._resolve(stage)
        return fingerprint({k: v for k, v in node.items() if k not in RUNNER_KEYS})

    def needs(self, stage: str) -> set[str]:
        """Return the stages whose artifacts a stage names."""
        named: set[str] = set()
        with references(lambda name: named.add(self._known(name, stage)) or name):
            self._resolve(stage)
        return named

    def told(self, message: str, stage: str) -> str:
        """Write out the keys that a message of a stage names as `stages.<stage>.<key>`.

        A part of a recipe knows neither the stage that it works in nor that its node may repeat
        another one, `${stages.<other>.<key>}`, and is to be changed there.
        """
        raw = OmegaConf.to_container(self.config.stages[stage], resolve=False)
        assert isinstance(raw, dict)

        def place(found: re.Match[str]) -> str:
            taken = re.fullmatch(r"\$\{([\w.]+)\}", str(raw.get(found[1])))
            return taken[1] if taken else f"stages.{stage}.{found[1]}"

        return re.sub(r"stages\.<stage>\.(\w+)", place, message)

    def path_of(self, reference: str) -> Path:
        """Return the path that a value of the config stands for, such as `models.student`."""
        with references(lambda name: str(self.artifact(name))):
            return Path(str(OmegaConf.select(self.config, reference)))

    def _resolve(self, stage: str) -> dict[str, Any]:
        node = OmegaConf.to_container(self.config.stages[stage], resolve=True)
        assert isinstance(node, dict)
        return {str(k): v for k, v in node.items()}

    def _known(self, name: str, asked_by: str) -> str:
        """Return `name` if it is a stage that comes before `asked_by`.

        Raises:
            UserError: when it is not.
        """
        order = self.stages
        if name not in order:
            if name in self.config.stages:
                raise UserError(
                    f"stages.{asked_by} needs the artifact of the stage {name!r}, which is left "
                    f"out; leave {asked_by} out, too, or keep {name}"
                )
            raise UserError(
                f"stages.{asked_by} needs the artifact of the stage {name!r}, which this recipe "
                f"does not have; its stages are {', '.join(order)}"
                f"{did_you_mean(name, order)}"
            )
        if order.index(name) >= order.index(asked_by):
            raise UserError(
                f"stages.{asked_by} needs the artifact of the stage {name!r}, which comes after "
                "it; a stage can only name earlier ones"
            )
        return name
