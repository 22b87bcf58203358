"""Which runs a comparison is against: a role, or the group that a `key=value` picks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml
from omegaconf import OmegaConf

from stillhouse.errors import UserError, did_you_mean
from stillhouse.tracking.folding import Baseline, Group
from stillhouse.tracking.gather import Run


def choose_baseline(groups: Sequence[Group], text: str | None) -> Baseline | None:
    """Return the baseline that the user asked for.

    Args:
        groups: all groups of the comparison.
        text: a role, or `key=value`: an override of the picked runs or a value of their config.

    Raises:
        UserError: when no run has the role or the value, or when several groups have the value.
    """
    if text is None:
        return None
    if "=" in text:
        return Baseline(text, group=_pick(groups, text))
    roles = list(dict.fromkeys(role for group in groups for role in group.roles))
    if text not in roles:
        raise UserError(
            f"baseline={text}: no run has a model of that role; expected {', '.join(roles)}, or "
            f"key=value{did_you_mean(text, roles)}"
        )
    return Baseline(text, role=text)


def _pick(groups: Sequence[Group], text: str) -> Group:
    """Return the one group whose runs have the value."""
    key, _, wanted = text.partition("=")
    picked = [g for g in groups if any(_has(run, key, wanted) for run in g.runs)]
    if len(picked) == 1:
        return picked[0]
    if picked:
        raise UserError(
            f"baseline={text}: it picks {len(picked)} groups, expected one: "
            f"{'; '.join(g.label for g in picked)}; name a value that one of them has alone, or "
            "leave the others out of runs"
        )
    runs = [run for group in groups for run in group.runs]
    found = [str(v) for run in runs for v in _settings(run, key) if not isinstance(v, dict)]
    if found:
        values = sorted(set(found))
        raise UserError(
            f"baseline={text}: no run has that value; the runs have {key}={', '.join(values)}"
            f"{did_you_mean(wanted, values)}"
        )
    keys = {k: None for run in runs for k in ("recipe", *_override_keys(run), *_keys(run.config))}
    raise UserError(f"baseline={text}: no run has the key {key}{did_you_mean(key, keys)}")


def _has(run: Run, key: str, wanted: str) -> bool:
    return any(str(v) == wanted or v == _parsed(wanted) for v in _settings(run, key))


def _settings(run: Run, key: str) -> list[Any]:
    """Return what a run says of a key: the override's value, and the resolved config's."""
    found = [
        _parsed(override.partition("=")[2])
        for override, name in zip(run.overrides, _override_keys(run), strict=True)
        if name == key
    ]
    node: Any = {"recipe": run.recipe, **run.config}
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return found
        node = node[part]
    return [*found, node]


def _override_keys(run: Run) -> list[str]:
    return [override.lstrip("+~").partition("=")[0] for override in run.overrides]


def _parsed(text: str) -> Any:
    """Read a value as a config would: 1 equals 1.0, and 1e-3 is a number."""
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index, call-overload]
    except (yaml.YAMLError, ValueError):
        return text


def _keys(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
