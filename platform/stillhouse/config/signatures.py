"""Signatures are the schema: every `_target_` of a recipe is bound before the first stage runs.

By house rule a target's keyword-only parameters are its config and its positional ones are live
objects that the caller hands over, so a YAML file names keywords only.
"""

import glob
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from stillhouse.errors import UserError, did_you_mean
from stillhouse.ranges import Range
from stillhouse.stages.workspace import RUNNER_KEYS

MODEL_FILES = ("config.json", "model_index.json")
CONTROL_KEYS = frozenset({"_target_", "_partial_", "_recursive_", "_convert_", "_args_"})


def check(config: DictConfig, stages: list[str]) -> None:
    """Bind every `_target_` of the stages and the root groups to its signature.

    Raises:
        UserError: for a key that the target does not take, a value of another type, a value that
            is still missing, or a target that cannot be found.
    """
    for key, value in _leaves(OmegaConf.to_container(config, resolve=False)):
        if value == "???":
            raise UserError(f"{key} has no value; set it with {key}=<value>")
    for path, node in nodes_with_targets(config, stages):
        check_node(path, node)
        _check_paths(path, node)


def check_below(config: DictConfig, root: str) -> None:
    """Bind every `_target_` at and below one key of a config to its signature.

    Raises:
        UserError: as `check`.
    """
    for path, node in _walk(config, root):
        check_node(path, node)
        _check_paths(path, node)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node


def _check_paths(path: str, node: DictConfig) -> None:
    """Refuse a local path that leads nowhere, before a library looks for it on a hub."""
    for key, value in OmegaConf.to_container(node, resolve=False).items():  # type: ignore[union-attr]
        names_a_path = isinstance(value, str) and str(key).endswith("path") and "${" not in value
        leads_nowhere = names_a_path and not Path(value).expanduser().exists()
        # Whether a pattern fits any file is for its reader to say.
        if leads_nowhere and re.match(r"[./~]", value) and not glob.has_magic(value):
            raise UserError(f"{path}.{key}={value}: there is no such file or folder")
        # By house rule a key named `path` alone is a model, of transformers or diffusers.
        holds_no_model = names_a_path and key == "path" and Path(value).expanduser().is_dir()
        if holds_no_model and not any((Path(value).expanduser() / f).exists() for f in MODEL_FILES):
            raise UserError(
                f"{path}.{key}={value}: the folder has no {MODEL_FILES[0]}; expected a model saved "
                "with save_pretrained, for example the student/ of a run directory"
            )


def nodes_with_targets(config: DictConfig, stages: list[str]) -> Iterator[tuple[str, DictConfig]]:
    """Yield (dotted path, node) of every node with a `_target_`, at the place that decides it.

    What a stage interpolates from a root group is yielded under the root group's name.
    """
    seen: set[str] = set()
    roots = [f"stages.{stage}" for stage in stages] + ["tracking"]
    for root in roots:
        for path, node in _walk(config, root):
            if path not in seen:
                seen.add(path)
                yield path, node


def _walk(config: DictConfig, path: str) -> Iterator[tuple[str, DictConfig]]:
    parent, _, key = path.rpartition(".")
    holder = OmegaConf.select(config, parent) if parent else config
    raw = OmegaConf.to_container(holder, resolve=False)[key]  # type: ignore[index, call-overload]
    if isinstance(raw, str) and raw.startswith("${") and raw.endswith("}"):
        inner = raw[2:-1]
        if ":" not in inner and not inner.startswith("."):
            _check_named(config, path, inner)
            yield from _walk(config, inner)
        return
    node = holder[key]
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for child in node:
            yield from _walk(config, f"{path}.{child}")


def _check_named(config: DictConfig, path: str, named: str) -> None:
    """Refuse a value that is taken from what is not there, or is null, such as a stage left out."""
    parts = named.split(".")
    for end, part in enumerate(parts):
        node = ".".join(parts[:end])
        holder: Any = OmegaConf.select(config, node) if node else config
        if holder is None:
            raise UserError(
                f"{path} takes its value from {named}, and {node} is left out (null): keep {node}, "
                f"set {path} by itself, or leave that out too"
            )
        # A key that has no value yet is one too, which `in holder` denies.
        if isinstance(holder, DictConfig) and part not in list(holder):
            raise UserError(
                f"{path} takes its value from {named}, which is not there: set {path} by itself"
            )


def check_node(path: str, node: DictConfig) -> None:
    """Bind one node to the signature of its `_target_`."""
    target = locate(path, str(node._target_))
    name = str(node._target_).rpartition(".")[2]
    parameters = keywords_of(target)
    given = [str(k) for k in node if k not in CONTROL_KEYS]
    if parameters is None:
        return
    if path.startswith("stages.") and path.count(".") == 1:
        given = [k for k in given if k not in RUNNER_KEYS]
    for key in given:
        if key not in parameters:
            raise UserError(
                f"{path}.{key}: {name} takes no {key!r}; it takes {', '.join(parameters)}"
                f"{did_you_mean(key, parameters)}"
            )
    for key, parameter in parameters.items():
        if key not in given and parameter.default is parameter.empty:
            raise UserError(f"{path}: {name} needs a value for {key!r}; set {path}.{key}=<value>")
    hints = _type_hints(target)
    for key in given:
        value = raw = OmegaConf.to_container(node)[key]  # type: ignore[index, call-overload]
        if isinstance(raw, str) and raw.startswith("${oc."):
            value = node[key]
        interpolated = isinstance(value, str) and "${" in value
        if key in hints and not interpolated and not fits(value, hints[key]):
            said = "null" if value is None else value
            # A null that nobody wrote: it is looked up where there is nothing.
            absent = f"; it is {raw}, which has no value here: set {path}.{key}=<value>"
            way_out = absent if value is None and raw is not None else ""
            raise UserError(f"{path}.{key}={said}: expected {_say(hints[key], value)}{way_out}")


def locate(path: str, target: str) -> Callable[..., Any]:
    """Return the object that a `_target_` names.

    Raises:
        UserError: when it cannot be imported.
    """
    try:
        return get_object(target)
    except Exception as error:
        raise UserError(f"{path}._target_={target}: {_root_cause(error)}") from error


def keywords_of(target: Callable[..., Any]) -> dict[str, inspect.Parameter] | None:
    """Return the parameters that a YAML node may name; None when the target takes any.

    A target of this project names its keyword-only parameters; of another library, all.
    """
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except ValueError:
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    ours = getattr(target, "__module__", "").startswith("stillhouse")
    kinds = (inspect.Parameter.KEYWORD_ONLY,)
    if not ours:
        return {p.name: p.replace(default=None) for p in parameters}
    return {p.name: p for p in parameters if p.kind in kinds}


def fits(value: Any, hint: Any) -> bool:
    """Whether a YAML value can stand where a parameter's annotation is `hint`.

    Only plain types are judged, and the ranges beside them; whatever the check does not know
    passes.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(value, dict):
        return True
    if origin is Annotated:
        return fits(value, arguments[0]) and all(r.holds(value) for r in _ranges(hint))
    if origin in (Union, types.UnionType):
        return any(fits(value, a) for a in arguments)
    if origin is Literal:
        return value in arguments
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin in (list, tuple, Sequence) or hint in (list, tuple):
        return isinstance(value, list)
    return not (origin is dict or hint is dict)


def _type_hints(target: Callable[..., Any]) -> dict[str, Any]:
    subject = target.__init__ if inspect.isclass(target) else target
    try:
        return typing.get_type_hints(subject, include_extras=True)
    except Exception:  # a library's hints may name what is not installed: then its types go unread
        return {}


def _ranges(hint: Any) -> list[Range]:
    return [said for said in getattr(hint, "__metadata__", ()) if isinstance(said, Range)]


def _say(hint: Any, value: Any) -> str:
    """Say what a hint allows: its range to a value of its type, its type to any other."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        said = [_say(a, value) for a in typing.get_args(hint)]
        return (", or " if any(map(_ranges, typing.get_args(hint))) else " or ").join(said)
    if typing.get_origin(hint) is Annotated:
        ranges, plain = _ranges(hint), typing.get_args(hint)[0]
        in_words = ranges and fits(value, plain)
        return ", ".join(r.words for r in ranges) if in_words else _say(plain, value)
    if typing.get_origin(hint) is Literal:
        return " or ".join(str(a) for a in typing.get_args(hint))
    return "null" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"
