"""What of a config decides a result, and how two configs differ in it."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from stillhouse.files import hash_json
from stillhouse.stages.fingerprint import without_neutral_keys

# Keys that say how a run is carried out, shown and described, not what it computes.
CONDUCT = ("summary", "duration", "plan", "stop_after", "force", "resume", "tracking", "paths")
CONDUCT += ("debug", "hydra")


def essence(config: DictConfig) -> dict[str, Any]:
    """Return the resolved config without what cannot change a result: how, where, how visibly."""
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return without_neutral_keys({k: v for k, v in resolved.items() if k not in CONDUCT})


def config_hash(config: DictConfig) -> str:
    """Hash a config without its seed: repeats of one setting share the hash."""
    unseeded = config.copy()
    unseeded.seed = 0
    return hash_json(essence(unseeded))[:16]


def explain_differences(then: DictConfig, now: DictConfig) -> str | None:
    """Say in one line how two configs differ in what they compute; None when they do not."""
    found = _differences(essence(then), essence(now))
    if not found:
        return None
    more = f"; and {len(found) - 8} more" if len(found) > 8 else ""
    return f"({len(found)} keys, then -> now): {'; '.join(found[:8])}{more}"


def _differences(then: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        found = []
        for key in sorted(then.keys() | now.keys(), key=str):
            below = f"{path}.{key}" if path else str(key)
            found += _differences(then.get(key, "(none)"), now.get(key, "(none)"), below)
        # A root group and the stages that interpolate it differ in the same way: say it once.
        return [d for d in found if not (d.startswith("stages.") and _said(d, found))]
    return [] if then == now else [f"{path}: {then} -> {now}"]


def _said(difference: str, differences: list[str]) -> bool:
    return difference.count(".") > 1 and difference.split(".", 2)[2] in differences
