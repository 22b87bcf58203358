"""What differs between the configs of groups; pure on records."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stillhouse.config.essence import CONDUCT
from stillhouse.stages.fingerprint import without_neutral_keys
from stillhouse.tracking.folding import Group, overrides_told
from stillhouse.tracking.gather import Run

# What a group lacks; no value of a config has this text.
ABSENT = "—"


@dataclass(frozen=True)
class Varied:
    """A key that not all groups have the same value of.

    Attributes:
        key: dotted path into the config.
        values: a group each, in the order of the groups, as text; `ABSENT` where it has none.
        told: whether the command line of a group named it, or it is the recipe.
    """

    key: str
    values: tuple[str, ...]
    told: bool

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The values as numbers; None where one is no number."""
        try:
            return tuple(float(value) for value in self.values)
        except ValueError:
            return None


def varied_keys(groups: Sequence[Group]) -> list[Varied]:
    """Return the keys that tell groups apart: those of the command line first, then the config's.

    A group's stages that repeat a root group's value are not told again; a key that changes between
    the repeats of a group (a seed) tells nothing.
    """
    told = [_told(group) for group in groups]
    configs = [{**_config(group), **said} for group, said in zip(groups, told, strict=True)]
    found: dict[str, Varied] = {}
    named = {key for said in told for key in said} | {"recipe"}
    for key in sorted({k: None for c in configs for k in c}, key=lambda k: k not in named):
        values = tuple(config.get(key, ABSENT) for config in configs)
        if len(set(values)) > 1:
            found[key] = Varied(key, values, key in named)
    return [varied for varied in found.values() if not _repeats(varied, found)]


def _told(group: Group) -> dict[str, str]:
    """Return the overrides of a group, with the config's form of a value where it has the key."""
    config = _config(group)
    pairs = (override.lstrip("~").partition("=") for override in overrides_told(group))
    own = {key: value for key, _, value in pairs}
    return {key: config.get(key, value) for key, value in own.items() if not _is_node(key, config)}


def _is_node(key: str, config: Mapping[str, str]) -> bool:
    """Whether an override chose a whole node, whose keys are compared one by one."""
    return key not in config and any(k.startswith(f"{key}.") for k in config)


def _config(group: Group) -> dict[str, str]:
    """Flatten what the runs of a group agree on."""
    flat = [_flat(run) for run in group.runs]
    shared = {k: v for k, v in flat[0].items() if all(other.get(k) == v for other in flat)}
    return {"recipe": group.recipe, **shared}


def _flat(run: Run) -> dict[str, str]:
    """Flatten what of a run's config can change its result, without what follows its seed."""
    kept = {k: v for k, v in run.config.items() if k not in CONDUCT}
    leaves = _leaves(without_neutral_keys(kept))
    return {k: v for k, v in leaves if k.split(".")[-1] != "seed" or v != str(run.seed)}


def _leaves(node: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield dotted keys with their values; an empty node is as none, which W&B makes of it."""
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else _text(value)


def _text(value: Any) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def _repeats(varied: Varied, found: Mapping[str, Varied]) -> bool:
    """Whether a stage's key says what its root group's says (`stages.distil.method.loss`)."""
    parts = varied.key.split(".", 2)
    if len(parts) < 3 or parts[0] != "stages":
        return False
    return parts[2] in found and found[parts[2]].values == varied.values
