"""One line for what Hydra, OmegaConf or a stage found wrong, with the nearest valid names."""

import errno
import os
import re
from pathlib import Path
from typing import Any, TextIO

from stillhouse.config.arguments import groups, option, overrides_of
from stillhouse.errors import UserError, did_you_mean

# Option of `hydra/launcher` -> how to install what brings it.
SUBMITIT = "pip install -e '.[slurm]'"
LAUNCHERS = {
    "joblib": "pip install -e '.[sweeps]'",
    "submitit_local": SUBMITIT,
    "submitit_slurm": SUBMITIT,
    # Its pin of cloudpickle does not fit joblib; Ray brings a copy of its own.
    "ray": "pip install 'ray[default]' boto3 && pip install --no-deps hydra-ray-launcher",
}


def one_line(error: Exception, argv: list[str], conf: Path) -> str | None:
    """Return the line to print for an error that the user can mend; None for a fault of ours."""
    if isinstance(error, UserError):
        return _said(error)
    if type(error).__name__ == "TerminatedWorkerError":
        return (
            "a worker of the launcher was killed from outside, perhaps for want of memory, and the "
            "others ended with it; give hydra.launcher.n_jobs fewer"
        )
    if type(error).__module__.startswith("submitit.") or 'detect "srun"' in str(error):
        return _of_submitit(error)
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    cause: Any = error
    while cause.__cause__ is not None and not isinstance(cause, MissingConfigException | UserError):
        cause = cause.__cause__
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.ENOTDIR):
        return (
            f"{error.filename}: {error.strerror}; choose another place with paths.outputs=<folder> "
            "or paths.cache=<folder>"
        )
    # OmegaConf keeps of an error inside a resolver nothing but its text.
    inside = re.search(r"UserError raised while resolving interpolation: ([^\n]*)", str(error))
    if inside:
        return inside.group(1)
    if isinstance(cause, UserError):
        return _said(cause)
    if isinstance(error, MissingConfigException):
        return _missing_option(error, conf)
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override}: the value cannot be read; put a text with quotes, commas, brackets "
            'or the like in it between double quotes: \'key=["one, two","(three)"]\''
        )
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    key = getattr(cause, "full_key", None) or _named_key(str(error))
    text = " ".join(str(cause).split(" full_key:")[0].split("\n")[0].split())
    if "is not in struct" in text or "not in struct" in str(error) or "not in '" in text:
        return _unknown_key(key or "", argv, conf)
    if text.startswith("Ambiguous value for argument"):
        return _list_of_one_run(text)
    if "Could not override" in str(error) and "No match in the defaults list" in str(error):
        return _unknown_group(str(error), argv, conf)
    if "Cannot merge DictConfig with ListConfig" in text:
        given = next(o for o in overrides_of(argv) if o.startswith(f"{key}="))
        return (
            f"{key}: the recipe has settings there, which a list does not replace; take them out "
            f"first: '~{key}' '+{given}'"
        )
    return f"{key}: {text}" if key and key not in text else text


def _said(error: UserError) -> str:
    """Return a message in one line; where a library met no hub, say who keeps it away."""
    text = " ".join(str(error).split())
    offline = "huggingface.co" in text and os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0")
    return f"{text} HF_HUB_OFFLINE is set, and nothing is fetched: unset it" if offline else text


def _list_of_one_run(text: str) -> str:
    """Tell values apart by commas, which only a sweep takes."""
    override = text.partition("'")[2].rpartition("'")[0]
    key, _, value = override.partition("=")
    return (
        f"{override}: values apart by commas are for a sweep, -m; a text with a comma goes between "
        f"double quotes, '{key}=\"{value}\"', a list between brackets, '{key}=[{value}]'"
    )


def _of_submitit(error: Exception) -> str | None:
    """Tell what became of a job of submitit, from inside of it or from the command that gave it."""
    kind, text = type(error).__name__, str(error)
    if 'detect "srun"' in text:
        return (
            "hydra/launcher=slurm: this machine has no srun; start the sweep where SLURM's "
            "commands are, or run its jobs on this machine with hydra/launcher=joblib"
        )
    if "Job not requeued because" in text:
        return (
            "the job's time was over; hydra.launcher.timeout_min=<minutes> gives it more, and with "
            "hydra.launcher.max_num_timeout=<n> it goes on from its last checkpoint, n times"
        )
    if kind == "UncompletedJobError":
        return (
            "a job of the launcher ended without a result, killed or out of memory or time; what "
            "it wrote is in .submitit of the sweep's folder; jobs that run go on by themselves: "
            "--config-name jobs sweep=<folder> shows them"
        )
    if "failed during processing" in text:
        return None
    return f"SLURM does not take the jobs: {' '.join(text.split())}; set hydra.launcher.<key>"


def _missing_option(error: Any, conf: Path) -> str:
    """Tell an option that a group does not have, or a job that does not exist."""
    name = str(error.missing_cfg_file or "")
    group, _, choice = name.rpartition("/")
    if group == "hydra/launcher" and choice in LAUNCHERS:
        return (
            f"hydra/launcher: {choice} needs a package that is not installed: {LAUNCHERS[choice]}"
        )
    options = list(error.options or groups(conf).get(group, []))
    if not group:
        options = sorted(p.stem for p in conf.glob("*.yaml"))
        return (
            f"--config-name {choice}: there is no such job; expected {', '.join(options)}"
            f"{did_you_mean(choice, options)}"
        )
    return (
        f"{group}={choice}: the group {group} has no such option; expected {', '.join(options)}"
        f"{did_you_mean(choice, options)}"
    )


def _unknown_group(text: str, argv: list[str], conf: Path) -> str:
    found = re.search(r"override '([^']+)'", text)
    name = found.group(1).split("@")[0] if found else ""
    known = list(groups(conf))
    if name in known:
        job = option(argv, "--config-name", "-cn") or "run"
        return f"{name}: the job {job} has no group of that name; groups make up the job run"
    return (
        f"{name}: there is no group of that name; expected {', '.join(known)}"
        f"{did_you_mean(name, known)}"
    )


def _unknown_key(key: str, argv: list[str], conf: Path) -> str:
    """Tell a key that the config does not have, with the places where its name stands."""
    from stillhouse.config.preflight import UNCOMPOSED, compose_job, nearest_keys

    overrides = overrides_of(argv)
    own = next((o for o in overrides if o.lstrip("+~").partition("=")[0].startswith(key)), None)
    key = own.lstrip("+~").partition("=")[0] if own else key
    choices = [o for o in overrides if o.partition("=")[0] in groups(conf)]
    job = option(argv, "--config-name", "-cn") or "run"
    try:
        near = nearest_keys(compose_job([c for c in choices if "," not in c], conf, job), key)
    except UNCOMPOSED:  # the names are a help; without them the line still says what is wrong
        near = []
    hint = f"; did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
    return f"{key}: the config has no such key{hint}"


def _named_key(text: str) -> str | None:
    found = re.search(r"(?:full_key:|Key|Could not override) '?([\w.@/]+)'?", text)
    return found.group(1) if found else None


class WithoutHydrasOwn:
    """A stream that leaves out Hydra's "Error executing job" line: we tell the error ourselves."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text, save Hydra's line."""
        if text.startswith("Error executing job with overrides"):
            return len(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
