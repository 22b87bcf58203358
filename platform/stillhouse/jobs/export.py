"""The job `export`: take a finished run's model home, as an ordinary folder with a model card."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text

from stillhouse.config.signatures import MODEL_FILES
from stillhouse.errors import UserError
from stillhouse.files import MANIFEST, SERIES, remove
from stillhouse.jobs.finished_run import read_run
from stillhouse.jobs.model_card import model_card
from stillhouse.jobs.origins import origins_of
from stillhouse.jobs.places import new_folder

CARD = "README.md"


def export_run(config: DictConfig, folder: Path) -> None:
    """Copy a model of the run to a new folder and write its card beside it, whole or not at all.

    Args:
        config: a `schema.Export`.
        folder: unused; the job leaves no run directory.

    Raises:
        UserError: when the run, the role or the folder `to` cannot be used.
    """
    to = new_folder(config.to)
    run = read_run(config)
    role = run.role(config.role)
    stage = run.stage_of(run.models[role])
    if stage is None:
        own = [r for r, path in run.models.items() if run.stage_of(path) is not None]
        raise UserError(
            f"role={role}: its model {run.models[role]} comes from outside the run, there is "
            f"nothing to export; expected {' or '.join(own)}"
        )
    source = Path(run.model(role))
    origins = origins_of(run, stage)
    card = model_card(
        run, role, origins, architecture=_architecture(source), licence=config.licence
    )

    def write(target: Path) -> None:
        shutil.copytree(source, target, ignore=shutil.ignore_patterns(MANIFEST, SERIES))
        for name, text in origins.licences.items():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(text, target / name)
        (target / CARD).write_text(card, encoding="utf-8")

    _move_into_place(write, to, config.to)
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"{to}: the {role} of {run.folder}, an ordinary model folder"))
    console.print(Text(f"  {CARD:<29} its model card; read its licence note before you share it"))


def _architecture(folder: Path) -> dict[str, Any]:
    """Return a model's `config.json`, or the `model_index.json` of a pipeline."""
    path = next(p for p in map(folder.joinpath, MODEL_FILES) if p.is_file())
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error


def _move_into_place(write: Callable[[Path], None], to: Path, given: str) -> None:
    """Let `write` make a folder beside `to` and move it there once it is whole."""
    partial = to.with_name(f".{to.name}.{os.getpid()}")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, to)
    except OSError as error:
        raise UserError(
            f"to={given}: cannot be written: {error.strerror or error}; choose another folder with "
            "to=<folder>"
        ) from error
    finally:
        remove(partial)
