"""The job `evaluate`: measure a finished run's models anew, beside others, differently."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from stillhouse.config import signatures
from stillhouse.errors import UserError, did_you_mean
from stillhouse.files import write_json
from stillhouse.jobs.finished_run import FinishedRun, as_texts, model_path, read_run
from stillhouse.jobs.places import output_folder
from stillhouse.tracking.compare import publish
from stillhouse.tracking.report import print_results

STAGE = "stillhouse.stages.evaluate.Evaluate"


def evaluate_run(config: DictConfig, folder: Path) -> None:
    """Evaluate as the run did; print its table; write `models.json` and `samples.json`.

    Args:
        config: a `schema.Evaluation`.
        folder: unused; the job leaves no run directory.

    Raises:
        UserError: when the run, a role, a model, a setting or the folder `to` cannot be used.
    """
    to = output_folder(config.to)
    run = read_run(config)
    stage = _evaluation_of(run)
    evaluator = _changed(run, stage["evaluator"], config, "settings")
    data = _changed(run, stage["data"], config, "data")
    models = _chosen_models(run, config, evaluator.get("reference"))

    from hydra.utils import instantiate

    from stillhouse.evaluation.positions import KEY
    from stillhouse.stages.runner import quiet_libraries

    quiet_libraries()
    console = Console(highlight=False, soft_wrap=True)
    with console.status(f"evaluate: {', '.join(models)}"):
        try:
            evaluated = instantiate(evaluator)(
                models, instantiate(data, _recursive_=False)(stage["seed"])
            )
        except UserError as error:  # it speaks of the evaluator of a stage
            raise UserError(str(error).replace(KEY, "settings")) from error
    print_results(run.recipe, evaluated.models, console)

    def write(target: Path) -> None:
        write_json(target / "models.json", evaluated.models)
        write_json(target / "samples.json", evaluated.samples)

    names = publish(write, to)
    console.print(Text(f"{to}: {', '.join(names)}"))


def _evaluation_of(run: FinishedRun) -> Mapping[str, Any]:
    """Return the node of the stage that made the run's table, the last one where it has several."""
    nodes = [node for node in run.stages.values() if node["_target_"] == STAGE]
    if not nodes:
        raise UserError(
            f"run={run.folder}: the recipe {run.recipe} has no stage that evaluates; its stages "
            f"are {', '.join(run.stages)}"
        )
    return nodes[-1]


def _changed(
    run: FinishedRun, node: Mapping[str, Any], config: DictConfig, key: str
) -> dict[str, Any]:
    """Return a node of the run with the job's changes, its artifacts located.

    Raises:
        UserError: for a change that the node's target does not take.
    """
    changed = OmegaConf.merge(OmegaConf.create({key: node}), {key: config[key]})
    plain: Any = run.located(OmegaConf.to_container(changed))
    signatures.check_below(DictConfig(plain), key)
    return plain[key]


def _chosen_models(run: FinishedRun, config: DictConfig, reference: str | None) -> dict[str, str]:
    """Return role -> path in the recipe's order, the further models last.

    The reference is among them: without it the others cannot be compared with it.

    Raises:
        UserError: for a role that the run does not have, or that a further model would hide.
    """
    further = {str(role): str(path) for role, path in config.models.items()}
    hidden = [role for role in further if role in run.models]
    if hidden:
        raise UserError(
            f"models.{hidden[0]}: the run has a model of that name; expected another name than "
            f"{', '.join(run.models)}"
        )
    wanted = list(run.models)
    if config.roles is not None:
        wanted = as_texts(config.roles, key="roles", example=", ".join(run.models))
    known = [*run.models, *further]
    for key, role in [*(("roles", r) for r in wanted), ("settings.reference", reference)]:
        if role is not None and role not in known:
            raise UserError(
                f"{key}={role}: there is no such model; expected {', '.join(known)}"
                f"{did_you_mean(role, known)}"
            )
    roles = [role for role in run.models if role in (*wanted, reference)]
    return {role: run.model(role) for role in roles} | {
        role: model_path(path, key=f"models.{role}") for role, path in further.items()
    }
