"""What is laid over a recipe: other options, `leave_out=…`, fewer stages, `debug=…`, small values.

The overlay of `debug` names leaves (`max_steps`, `hidden_size`, …), not places, so one file shrinks
every recipe. What the command line sets itself wins over it.
"""

from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from stillhouse.config import choices
from stillhouse.errors import UserError, did_you_mean


def apply(config: DictConfig, overrides: Collection[str] | None = None) -> None:
    """Drop what does not fit the user's options, leave stages out, lay `debug.everywhere` over all.

    Args:
        config: a composed recipe, unresolved; it is changed in place.
        overrides: the user's, `key=value`; by default those of the running Hydra job.

    Raises:
        UserError: for a name in `leave_out` that is no stage's.
    """
    given = _overrides_of_the_job() if overrides is None else list(overrides)
    choices.drop_values_of_others(config, given)
    for stage in config.leave_out:
        if stage not in config.stages:
            raise UserError(
                f"leave_out=[{stage}]: this recipe has no stage of that name; its stages are "
                f"{', '.join(config.stages)}{did_you_mean(stage, config.stages)}"
            )
        _keep_what_others_take(config, config, f"${{stages.{stage}.")
        config.stages[stage] = None
    if config.debug is None:
        return
    values = OmegaConf.to_container(config.debug.everywhere)
    assert isinstance(values, dict)
    kept = {o.lstrip("+~").partition("=")[0] for o in given}
    with open_dict(config):
        _lay_over(config, {str(k): v for k, v in values.items()}, kept, "")


def _keep_what_others_take(config: DictConfig, node: Any, prefix: str) -> None:
    """Write what other nodes interpolate from a stage in their places: its settings outlive it."""
    if not isinstance(node, DictConfig):
        return
    for key, value in OmegaConf.to_container(node, resolve=False).items():  # type: ignore[union-attr]
        if isinstance(value, str) and value.startswith(prefix) and value.endswith("}"):
            taken = OmegaConf.select(config, value[2:-1])
            raw = isinstance(taken, DictConfig | ListConfig)
            node[key] = OmegaConf.to_container(taken, resolve=False) if raw else taken
        elif isinstance(value, dict):
            _keep_what_others_take(config, node[key], prefix)


def _lay_over(node: Any, values: dict[str, Any], kept: set[str], prefix: str) -> None:
    if isinstance(node, ListConfig):
        for index in range(len(node)):
            if not OmegaConf.is_interpolation(node, index):  # type: ignore[arg-type]
                _lay_over(node[index], values, kept, f"{prefix}{index}.")
    elif isinstance(node, DictConfig):
        for key in list(node.keys()):
            path = f"{prefix}{key}"
            if path in ("debug", "hydra") or OmegaConf.is_interpolation(node, str(key)):
                continue
            inner = not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig)
            if key in values and path not in kept and not inner:
                node[key] = values[str(key)]
            elif not OmegaConf.is_missing(node, key):
                _lay_over(node[key], values, kept, f"{path}.")


def _overrides_of_the_job() -> list[str]:
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return []
    return list(HydraConfig.get().overrides.task)
