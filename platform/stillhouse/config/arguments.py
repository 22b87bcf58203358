"""What the command line says before Hydra reads it, and help."""

from pathlib import Path

import yaml

from stillhouse.errors import UserError, did_you_mean

USAGE = """\
Stillhouse: small fast models from large slow ones.

  python run.py                                     the default recipe (word_kd)
  python run.py experiment=<recipe> key=value …     another recipe, other values
  python run.py -m seed=0,1,2 method.temperature=1,2
                                                    a sweep, a run for every combination
  python run.py plan=true                           what is cached and what would run
  python run.py stop_after=<stage>                  only the first stages
  python run.py leave_out=[<stage>]                 without some of them
  python run.py force=<stage>                       a finished stage once more
  python run.py resume=<run directory>              go on with a killed run
  python run.py debug=tiny                          the recipe in seconds (also: fast, overfit)
  python run.py --cfg job --resolve                 the config that would run
  python run.py --config-name jobs sweep=<sweep directory>
                                                    how far the jobs of a sweep are
  python run.py --config-name compare 'runs=[outputs/word_kd/*]' baseline=student_alone
                                                    a table over runs, curves, pictures
  python run.py --config-name evaluate run=<run directory>
                                                    its models measured anew
  python run.py --config-name sample run=<run directory> 'prompts=[In the beginning]'
                                                    what its student writes
  python run.py --config-name export run=<run directory> to=<folder>
                                                    its student with a model card

Recipes:
"""
# The options of `hydra.main`.
WITH_VALUE = {"--cfg", "-c", "--package", "-p", "--config-name", "-cn", "--config-path", "-cp"}
WITH_VALUE |= {"--config-dir", "-cd", "--info", "-i", "--experimental-rerun"}
WITHOUT_VALUE = {"--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"}
WITHOUT_VALUE |= {"--multirun", "-m", "--shell-completion", "-sc"}

AFTER = """
Groups (key=option): {groups}
Hydra's own options: --hydra-help
"""


def wants_help(argv: list[str]) -> bool:
    """Whether the command line asks for help."""
    return "--help" in argv or "-h" in argv


def wants_config(argv: list[str]) -> bool:
    """Whether the command line asks to see the job's config."""
    return option(argv, "--cfg", "-c") == "job"


def option(argv: list[str], *names: str) -> str | None:
    """Return the value of an option, `--name value` or `--name=value`; None when it is not set."""
    for index, argument in enumerate(argv):
        if argument in names and index + 1 < len(argv):
            return argv[index + 1]
        for name in names:
            if argument.startswith(f"{name}="):
                return argument.partition("=")[2]
    return None


def overrides_of(argv: list[str]) -> list[str]:
    """Return the `key=value` arguments; those of Hydra's own options are left out."""
    return split(argv)[1]


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's own options, with their values, and the `key=value` arguments.

    Raises:
        UserError: for an option that Hydra does not have.
    """
    options: list[str] = []
    overrides: list[str] = []
    waiting = False
    for argument in argv:
        name = argument.partition("=")[0]
        if waiting:
            options.append(argument)
            waiting = False
        elif not argument.startswith("-"):
            overrides.append(argument)
        elif name in WITH_VALUE | WITHOUT_VALUE:
            options.append(argument)
            waiting = name in WITH_VALUE and "=" not in argument
        else:
            known = sorted(o for o in WITH_VALUE | WITHOUT_VALUE if o.startswith("--"))
            raise UserError(
                f"{argument}: there is no such option; expected {', '.join(known)}"
                f"{did_you_mean(argument, known)}"
            )
    return options, overrides


def recipes(conf: Path) -> dict[str, tuple[str, str]]:
    """Return name -> (summary, duration) of every recipe."""
    found = {}
    for path in sorted((conf / "experiment").glob("*.yaml")):
        content = yaml.safe_load(path.read_text())
        found[path.stem] = (content.get("summary", ""), content.get("duration", ""))
    return found


def groups(conf: Path) -> dict[str, list[str]]:
    """Return group -> options; a group within another one is `evaluation/features`.

    `hydra` holds groups alone, and `wandb_sweep` holds files for `wandb sweep`.
    """
    return {
        folder.relative_to(conf).as_posix(): sorted(p.stem for p in folder.glob("*.yaml"))
        for folder in sorted(conf.rglob("*"))
        if folder.is_dir() and folder.name not in ("hydra", "wandb_sweep")
    }


def help_text(conf: Path) -> str:
    """Return what `--help` prints."""
    known = recipes(conf)
    width = max(len(name) for name in known)
    lines = [f"  {name:<{width}}  {summary}  ({time})" for name, (summary, time) in known.items()]
    shown = "\n" + "\n".join(
        f"  {group}: {', '.join(options)}"
        for group, options in groups(conf).items()
        if group not in ("experiment", "stage")
    )
    return USAGE + "\n".join(lines) + "\n" + AFTER.format(groups=shown)
