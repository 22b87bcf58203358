"""What is laid over a recipe: `debug=…`, small values, and `leave_out=…`, fewer stages.

The overlay of `debug` names leaves (`max_steps`, `hidden_size`, …), not places, so one file shrinks
every recipe. What the command line sets itself wins over it.
"""

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict

from stillhouse.errors import UserError, did_you_mean


def apply(config: DictConfig, overridden: set[str] | None = None) -> None:
    """Leave stages out, then lay `config.debug.everywhere` over the others and the root groups.

    Args:
        config: a composed recipe, unresolved; it is changed in place.
        overridden: dotted keys that the user set; by default those of the running Hydra job.

    Raises:
        UserError: for a name in `leave_out` that is no stage's.
    """
    for stage in config.leave_out:
        if stage not in config.stages:
            raise UserError(
                f"leave_out=[{stage}]: this recipe has no stage of that name; its stages are "
                f"{', '.join(config.stages)}{did_you_mean(stage, config.stages)}"
            )
        config.stages[stage] = None
    if config.debug is None:
        return
    values = OmegaConf.to_container(config.debug.everywhere)
    assert isinstance(values, dict)
    kept = _overridden_by_the_user() if overridden is None else overridden
    with open_dict(config):
        _lay_over(config, {str(k): v for k, v in values.items()}, kept, "")


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
            if key in values and path not in kept:
                node[key] = values[str(key)]
            elif not OmegaConf.is_missing(node, key):
                _lay_over(node[key], values, kept, f"{path}.")


def _overridden_by_the_user() -> set[str]:
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return set()
    return {o.lstrip("+~").partition("=")[0] for o in HydraConfig.get().overrides.task}
