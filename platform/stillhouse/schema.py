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
        leave_out: names of stages to leave out, a value that a sweep can run over.
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
    leave_out: list[str] = field(default_factory=list)
    plan: bool = False
    stop_after: str | None = None
    force: Any = None
    resume: str | None = None
    debug: Any = None
    method: Any = None
    data: Any = None
    teacher: Any = None
    codec: Any = None
    sharing: Any = None
    pruning: Any = None
    merging: Any = None
    decoding: Any = None
    student: Any = None
    trainer: Any = None
    optimizer: Any = None
    callbacks: Any = None
    evaluation: Any = None
    tracking: Any = None
    paths: Paths = field(default_factory=Paths)


@dataclass
class Jobs:
    """The job `jobs`: which sweep's ledger is shown.

    Attributes:
        sweep: its folder.
    """

    _target_: str = MISSING
    sweep: str = MISSING


@dataclass
class Comparison:
    """The job `compare`: which runs, against what, and where the result goes.

    Attributes:
        runs: run directories, sweep directories or globs of them, and runs at Weights & Biases as
            `wandb:<entity>/<project>/<group>`; one, or a list.
        baseline: a role (`student_alone`), or `key=value` that picks the baseline's runs.
        metrics: columns of the table; null shows every metric that one of the runs has.
        x: metric on the horizontal axis of the picture of quality.
        y: metric on its vertical axis; null takes `test_nll`, or else the table's first.
        to: folder of `compare.csv`, `compare.md`, `report.html` and the pictures.
        publish: whether the comparison becomes a W&B Report, too, in its runs' project.
    """

    _target_: str = MISSING
    runs: Any = MISSING
    baseline: str | None = None
    metrics: list[str] | None = None
    x: str = "parameters"
    y: str | None = None
    to: str = "compare"
    publish: bool = False


@dataclass
class Evaluation:
    """The job `evaluate`: which run to measure anew, beside what, and with what changed.

    Attributes:
        run: directory of a finished run.
        roles: of the run's models; null measures all. The one that others are compared with is
            measured in any case.
        models: further role -> folder or hub id of a model to put beside them.
        settings: values to change in the node of the run's evaluation.
        data: values to change in the node of the data that it evaluates on.
        to: folder of `models.json` and `samples.json`.
    """

    _target_: str = MISSING
    run: str = MISSING
    roles: Any = None
    models: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    to: str = "evaluate"


@dataclass
class Sampling:
    """The job `sample`: what a run's model is to write.

    Attributes:
        run: directory of a finished run.
        role: of the model; null takes the run's product.
        prompts: texts to go on from; null takes those of the run's evaluation.
        max_new_tokens: length of a continuation.
        temperature: 0 takes the likeliest token.
        seed: of the draws.
        chat: ask each prompt as a user's message, by the tokenizer's chat template.
        classes: of a generator, names of the classes to draw; null draws all.
        num_images: of a generator, samples a class.
        num_inference_steps: of a generator; null takes 1 of a few-step model, 50 of a flow.
        guidance_scale: of a generator; null takes its own.
        to: folder of `samples.json`, or of `samples.png`.
    """

    _target_: str = MISSING
    run: str = MISSING
    role: str | None = None
    prompts: Any = None
    max_new_tokens: int = 64
    temperature: float = 0.7
    seed: int = 0
    chat: bool = False
    classes: Any = None
    num_images: int = 10
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    to: str = "sample"


@dataclass
class Export:
    """The job `export`: which model to take home, and where to.

    Attributes:
        run: directory of a finished run.
        role: of the model; null takes the run's product.
        licence: the hub's name of the licence that you give the model, such as apache-2.0; null
            leaves it open.
        to: a folder that is new or empty.
    """

    _target_: str = MISSING
    run: str = MISSING
    role: str | None = None
    licence: str | None = None
    to: str = "export"


def register_schemas() -> None:
    """Make the skeletons known to Hydra, as `recipe_schema` and so on."""
    store = ConfigStore.instance()
    store.store(name="recipe_schema", node=Recipe)
    store.store(name="jobs_schema", node=Jobs)
    store.store(name="comparison_schema", node=Comparison)
    store.store(name="evaluation_schema", node=Evaluation)
    store.store(name="sampling_schema", node=Sampling)
    store.store(name="export_schema", node=Export)
