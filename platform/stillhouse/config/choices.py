"""Values that a recipe gives to its own choice of an option, where the user chose another one.

A recipe chooses options of groups and gives them values: `pruning: {n: 3}` is meant for
`least_distant`. Hydra lays it over whatever option is chosen in the end, so `pruning=given` would
be handed an `n` that nobody wrote for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from stillhouse.config import signatures
from stillhouse.stages.workspace import RUNNER_KEYS

NO_PARAMETERS = {*signatures.CONTROL_KEYS, *RUNNER_KEYS}


@dataclass(frozen=True)
class Choice:
    """An option that the user chose.

    Attributes:
        override: as it was written, such as `pruning@stages.random_run.choose=given`.
        group: of the option.
        option: its name.
        place: dotted key of the node that the option is laid on.
    """

    override: str
    group: str
    option: str
    place: str


def drop_values_of_others(config: DictConfig, overrides: Sequence[str]) -> None:
    """Drop what a recipe sets for an option of its own, and the user's choice does not take.

    A key stays, to be refused if it does not fit, where the user wrote it, where the chosen
    option's own file has it, and where the recipe by itself has the same `_target_`.

    Args:
        config: a composed recipe, unresolved; it is changed in place.
        overrides: the user's; where they choose an option, Hydra has to be initialised.
    """
    for choice in _choices(overrides):
        # Not so with experiment=… and debug=…, which give values to all there is.
        if not any(_not_in({}, config, choice.place)):
            continue
        written = [_key(o) for o in overrides if o != choice.override]
        option = _at(_composed(f"{choice.group}/{choice.option}"), _package_of(choice.group))
        found = [
            (holder, key)
            for holder, key in _not_in(option, config, choice.place)
            if not _is_written(f"{holder}.{key}", written)
        ]
        if not found:
            continue
        recipe = _composed("run", [o for o in overrides if o != choice.override and _is_plain(o)])
        for holder, key in found:
            node = OmegaConf.select(config, holder)
            if _at(recipe, holder).get("_target_") != node._target_:
                taken = signatures.keywords_of(signatures.locate(holder, str(node._target_)))
                if taken is not None and key not in taken:
                    with open_dict(config):
                        del node[key]


def _choices(overrides: Sequence[str]) -> Iterator[Choice]:
    """Yield the overrides that name an option of a group, wherever it is laid."""
    for override in filter(_is_plain, overrides):
        group, _, package = _key(override).partition("@")
        option = override.partition("=")[2]
        if option in GlobalHydra.instance().config_loader().get_group_options(group):
            yield Choice(override, group, option, package or _package_of(group))


def _package_of(group: str) -> str:
    """Return the key that a group is laid on unless it is laid elsewhere."""
    return group.replace("/", ".")


def _is_plain(override: str) -> bool:
    """Whether an override sets a key of the root or chooses an option."""
    return "=" in override and "." not in _key(override).partition("@")[0]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _is_written(path: str, written: Sequence[str]) -> bool:
    """Whether the user set a key, one below it, or a node that holds it."""
    return any(f"{path}.".startswith(f"{w}.") or w.startswith(f"{path}.") for w in written)


def _composed(name: str, overrides: Sequence[str] = ()) -> Any:
    return OmegaConf.to_container(compose(name, overrides=list(overrides)), resolve=False)


def _at(config: Any, place: str) -> Mapping[str, Any]:
    """Return the node of a plain config at a dotted key; an empty one where there is none."""
    for part in place.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config if isinstance(config, Mapping) else {}


def _not_in(option: Mapping[str, Any], config: DictConfig, place: str) -> Iterator[tuple[str, str]]:
    """Yield (holder, key) of what stands at or below a `_target_` and not in the option's file."""
    node = OmegaConf.select(config, place)
    if not isinstance(node, DictConfig):
        return
    for key in map(str, node):
        if "_target_" in node and key not in option and key not in NO_PARAMETERS:
            yield place, key
        elif not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
            yield from _not_in(_at(option, key), config, f"{place}.{key}")
