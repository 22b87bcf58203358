"""The typed skeleton of a config: what every job knows; signatures are the rest of the schema."""

from dataclasses import dataclass, field
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING


@dataclass
class Paths:
    """Folders. `cache` holds what runs share: teachers, tokenizers, signals, generated data."""

    cache: str = MISSING
    outputs: str = MISSING
    sweeps: str = MISSING


@dataclass
class Recipe:
    """A recipe and how to run it.

    Attributes:
        recipe: name of the recipe, the file in `conf/experiment/`.
        summary: a line for `--help`.
        duration: how long it takes, and on what.
        seed: of initialisation, order and every other draw of the stages that are not shared.
        product: the role whose model the run directory keeps in `student/`.
        models: role -> path of its model, for the evaluation and the product.
        stages: what is done, in this order; null leaves a stage out.
        plan: list the stages and what would run, and run nothing.
        stop_after: the last stage to run.
        force: a stage, or a list of stages, to run again although it is done.
        resume: a run directory to go on with.
        debug: an overlay of small values, laid over the whole config.
    """

    _target_: str = MISSING
    recipe: str = MISSING
    summary: str = ""
    duration: str = ""
    seed: int = 0
    product: str | None = None
    models: dict[str, Any] = field(default_factory=dict)
    stages: dict[str, Any] = field(default_factory=dict)
    plan: bool = False
    stop_after: str | None = None
    force: Any = None
    resume: str | None = None
    debug: Any = None
    method: Any = None
    data: Any = None
    teacher: Any = None
    student: Any = None
    trainer: Any = None
    optimizer: Any = None
    callbacks: Any = None
    evaluation: Any = None
    tracking: Any = None
    paths: Paths = field(default_factory=Paths)


@dataclass
class Comparison:
    """The job `compare`: which runs, against what, and where the result goes.

    Attributes:
        runs: run directories, sweep directories or globs of them.
        baseline: a role (`student_alone`), or `key=value` that picks the baseline's runs.
        metrics: columns of the table; null shows every metric that one of the runs has.
        to: folder of `compare.csv`, `compare.md` and the pictures.
    """

    _target_: str = MISSING
    runs: list[str] = MISSING
    baseline: str | None = None
    metrics: list[str] | None = None
    to: str = "compare"


def register_schemas() -> None:
    """Make the skeletons known to Hydra as `recipe_schema` and `comparison_schema`."""
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=Recipe)
    store.store(name="comparison_schema", node=Comparison)
