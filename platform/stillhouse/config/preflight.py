"""What is looked at before `hydra.main` begins, which would already write to the run directory."""

import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stillhouse.config import overlay
from stillhouse.config.arguments import groups, option, overrides_of, split
from stillhouse.config.essence import explain_differences
from stillhouse.errors import UserError
from stillhouse.files import CONFIG
from stillhouse.schema import register_schemas
from stillhouse.stages.workspace import register_resolvers

# What composing raises for keys and values that do not fit.
UNCOMPOSED = (HydraException, OmegaConfBaseException, UserError)
# Overrides that speak of one command and not of the run.
FOR_ONE_COMMAND = ("resume=", "plan=", "stop_after=", "force=")


def prepare(argv: list[str], conf: Path) -> list[str]:
    """Register what Hydra must know; check `resume`, `plan` and misplaced keys; return the argv.

    Raises:
        UserError: for a resume directory that is none or whose config differs, and for a key that
            was tried at a place that only interpolates it.
    """
    register_schemas()
    register_resolvers()
    # Tokenizers' threads and forked loader workers do not mix; this silences their warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    options, overrides = split(argv)
    # argparse takes overrides in one stretch only; a user may write them anywhere.
    argv = [*options, *overrides]
    _refuse_what_is_no_override(overrides, conf)
    job = option(argv, "--config-name", "-cn") or "run"
    if job != "run":
        return _prepare_reading(job, options, overrides, conf)
    values = dict(o.split("=", 1) for o in overrides if "=" in o)
    resumed = "resume" in values
    if resumed:
        argv = _resume(Path(values["resume"]), argv, overrides, conf)
    if values.get("plan", "").lower() == "true":
        argv = [*argv, "hydra.output_subdir=null", *([] if resumed else ["hydra.run.dir=."])]
    if {"-m", "--multirun"} & set(options):
        _refuse_searches(values)
    if any(o.startswith(("stages.", "+stages.")) for o in overrides):
        _refuse_interpolated_keys(overrides, conf)
    return argv


def _prepare_reading(job: str, options: list[str], overrides: list[str], conf: Path) -> list[str]:
    """Return the argv of a job that reads runs, spelled as Hydra wants it; refuse a sweep of it."""
    if {"-m", "--multirun"} & set(options) and (conf / f"{job}.yaml").is_file():
        raise UserError(
            f"-m: the job {job} leaves no run directory, so there is no sweep of it; start it once "
            "for each value, in a loop of the shell"
        )
    # Hydra's grammar wants quotes around a value with a second equals sign.
    quoted = [re.sub(r"^((?:baseline|run|to)=)([^'\"].*=.*)$", r'\1"\2"', o) for o in overrides]
    # What these change stands in the run's config and not in the job's, so it is always added.
    return [*options, *(re.sub(r"^(settings|data|models)\.", r"++\1.", o) for o in quoted)]


def _refuse_what_is_no_override(overrides: list[str], conf: Path) -> None:
    known = groups(conf)
    for override in overrides:
        # Only a deletion, `~key`, goes without a value.
        if not re.match(r"^([+~]{0,2}[A-Za-z_][\w./@:-]*=|~[A-Za-z_][\w./@:-]*$)", override):
            raise UserError(
                f"the argument {override!r} is not of the form key=value; quote values with spaces "
                "or commas as a whole: 'key=[a,b]'"
            )
        group, _, choice = override.partition("=")
        if group in known and choice in ("", "null"):
            raise UserError(
                f"{override}: a group takes the name of an option; expected "
                f"{', '.join(known[group])}"
            )


def compose_job(overrides: list[str], conf: Path, config_name: str = "run") -> DictConfig:
    """Compose a job's config as Hydra would, with what is laid over it."""
    with initialize_config_dir(config_dir=str(conf), version_base="1.3"):
        config = compose(config_name, overrides=overrides)
        if "debug" in config:
            overlay.apply(config, overrides)
    return config


def shown_config(argv: list[str], conf: Path) -> str:
    """Return what `--cfg job` prints, `--resolve` and `--package` honoured."""
    name = option(argv, "--config-name", "-cn") or "run"
    config: Any = compose_job(overrides_of(argv), conf, name)
    package = option(argv, "--package", "-p")
    if package:
        config = OmegaConf.select(config, package)
        if config is None:
            raise UserError(f"--package {package}: the config has no such key")
    return OmegaConf.to_yaml(config, resolve="--resolve" in argv)


def check_devices(config: DictConfig) -> None:
    """Refuse devices, nodes and strategies that a stage cannot start its ranks on.

    Raises:
        UserError: with the way out.
    """
    for place, trainer, count in _trainers(config):
        where = f"{place}.devices={trainer.devices}"
        if count == 0 or (isinstance(count, int) and count < -1):
            raise UserError(
                f"{where}: expected how many (1 or more), a list of which, or -1 for all that "
                "there are"
            )
        if trainer.num_nodes != 1:
            raise UserError(
                f"{place}.num_nodes={trainer.num_nodes}: this version trains on one machine; set "
                f"{place}.num_nodes=1, and {place}.devices=<number> for several devices of it"
            )
        if str(trainer.get("strategy")).startswith(("ddp_spawn", "ddp_fork", "ddp_notebook")):
            raise UserError(
                f"{place}.strategy={trainer.strategy}: it starts processes in its own way, and a "
                f"stage starts them itself; set {place}.strategy=ddp"
            )
        if count != 1 and "LOCAL_RANK" in os.environ:
            raise UserError(
                f"{where} where LOCAL_RANK={os.environ['LOCAL_RANK']} is set, as torchrun does: a "
                "stage starts its processes itself; start the command once, without torchrun"
            )


def _trainers(config: DictConfig) -> Iterator[tuple[str, DictConfig, int | str]]:
    """Yield (place, node, number of devices) of every trainer; -1 and auto stand for all."""
    for place in ["trainer", *(f"stages.{name}.trainer" for name in config.stages)]:
        trainer = OmegaConf.select(config, place)
        if trainer is not None and "devices" in trainer:
            devices = trainer.devices
            yield place, trainer, len(devices) if isinstance(devices, ListConfig) else devices


def _refuse_searches(values: dict[str, str]) -> None:
    """Refuse a sweeper that searches: the jobs of a sweep hand Hydra no number to search by."""
    sweeper = values.get("hydra/sweeper", "basic")
    if sweeper != "basic":
        raise UserError(
            f"hydra/sweeper={sweeper}: a sweeper that searches gets no number from the jobs; "
            "search with W&B (wandb sweep conf/wandb_sweep/<name>.yaml), or list the values: "
            "key=value,value"
        )


def _resume(folder: Path, argv: list[str], overrides: list[str], conf: Path) -> list[str]:
    """Check that `folder` is a run of the same config; return the argv that goes on in it."""
    saved_file, kept_file = folder / CONFIG, folder / ".hydra" / "overrides.yaml"
    if not saved_file.is_file() or not kept_file.is_file():
        what = "is no run directory" if folder.is_dir() else "does not exist"
        raise UserError(
            f"resume={folder}: the folder {what}; expected one that a run wrote, with {CONFIG} and "
            ".hydra/ in it, such as outputs/<recipe>/<time>"
        )
    kept = [str(o) for o in OmegaConf.load(kept_file) if not str(o).startswith(FOR_ONE_COMMAND)]
    given = [o for o in overrides if not o.startswith(("resume=", "hydra."))]
    options, _ = split(argv)
    saved = OmegaConf.load(saved_file)
    assert isinstance(saved, DictConfig)
    now = compose_job([*kept, *given], conf)
    differences = explain_differences(saved, now)
    if differences:
        raise UserError(
            f"resume={folder}: its config differs from this command's {differences}; give the same "
            "keys, or start a new run"
        )
    return [*options, *kept, *given, f"hydra.run.dir={folder}"]


def _refuse_interpolated_keys(overrides: list[str], conf: Path) -> None:
    """Refuse a key below a node of a stage that only repeats a root group.

    Hydra would follow the interpolation and change the root group for every stage that uses it.
    """
    recipe = [o for o in overrides if "." not in o.partition("=")[0] and "=" in o]
    try:
        config = compose_job([o for o in recipe if not _is_sweep(o)], conf)
    except UNCOMPOSED:  # Hydra composes the same again and its error is told from there
        return
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        parts = key.split(".")
        for depth in range(3, len(parts)):
            parent = OmegaConf.select(config, ".".join(parts[: depth - 1]))
            if not isinstance(parent, DictConfig) or parts[depth - 1] not in parent:
                break
            if OmegaConf.is_interpolation(parent, parts[depth - 1]):
                raw = OmegaConf.to_container(parent, resolve=False)[parts[depth - 1]]  # type: ignore[index, call-overload]
                root = ".".join([str(raw).strip("${}"), *parts[depth:]])
                raise UserError(
                    f"{key}: {'.'.join(parts[:depth])} is {raw}, the recipe's main value; "
                    f"set {root}={value}"
                )


def _is_sweep(override: str) -> bool:
    return "," in override.partition("=")[2] and override.partition("=")[0] != "force"


def nearest_keys(config: DictConfig, key: str) -> list[str]:
    """Return dotted keys of a config that a mistyped or misplaced key may have meant.

    First the names next to the place where the key breaks off, then the same name elsewhere.
    """
    parts = key.split(".")
    node: Any = config
    for depth, part in enumerate(parts):
        if isinstance(node, DictConfig) and part in node and depth < len(parts) - 1:
            node = node[part]
            continue
        siblings = [str(k) for k in node] if isinstance(node, DictConfig) else []
        near = difflib.get_close_matches(part, siblings, n=2, cutoff=0.7)
        beside = [".".join([*parts[:depth], n, *parts[depth + 1 :]]) for n in near]
        leaves = list(_leaves(config))
        beside = [b for b in beside if _stands_in(config, b)]
        same_name = [leaf for leaf in leaves if leaf.rpartition(".")[2] == parts[-1]]
        if beside:
            return beside
        if not same_name and len(siblings) <= 12:
            return [".".join([*parts[:depth], s]) for s in siblings if not s.startswith("_")]
        same_tail = [leaf for leaf in same_name if leaf.endswith(".".join(parts[-2:]))]
        return [k for k in same_tail or same_name if not k.startswith("debug.")][:3]
    return []


def _stands_in(config: DictConfig, key: str) -> bool:
    """Whether a config has a dotted key, with a value or without."""
    parent, _, name = key.rpartition(".")
    holder = OmegaConf.select(config, parent) if parent else config
    return isinstance(holder, DictConfig) and name in list(holder)


def _leaves(node: Any, prefix: str = "") -> Any:
    if isinstance(node, DictConfig):
        for key in node:
            yield f"{prefix}{key}"
            if not OmegaConf.is_interpolation(node, str(key)) and not OmegaConf.is_missing(
                node, key
            ):
                yield from _leaves(node[key], f"{prefix}{key}.")
