"""What a stage's W&B run says of the run that it belongs to; written and read back here.

A run directory is several W&B runs. With these facts in the config of each, and the numbers so far
in its summary, `compare` reads from W&B the record that it reads from the run directory.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from stillhouse.tracking.runs import Models, RunInfo

MODELS = "models"
# What a stage adds to its config besides: its inputs, and what it measured of its networks.
DESCRIBED = frozenset({"inputs", "student_parameters", "teacher_parameters"})


@dataclass(frozen=True)
class StageFacts:
    """Keys of a W&B run's config beside the keys of the resolved config.

    Attributes:
        run: what the W&B runs of one run directory share: the id of the first of them.
        stage: name of the stage in the recipe.
        last_stage: of the recipe; the run is done when this one is.
        artifact: name of what the stage makes.
        artifacts: names of what all stages make or take from the cache, in their order.
        overrides: the command line's own keys.
        config_hash: equal for runs that differ in their seed only.
        git: revision of the code.
    """

    run: str
    stage: str
    last_stage: str
    artifact: str
    artifacts: list[str]
    overrides: list[str]
    config_hash: str
    git: str | None


def facts_of(info: RunInfo, stage: str, run_ids: Mapping[str, str]) -> StageFacts:
    """Return what is said of a stage.

    Args:
        info: of the run.
        stage: one of its stages.
        run_ids: stage -> id of its W&B run, in the order in which they began.
    """
    artifacts = {made.stage: made.name for made in info.artifacts}
    return StageFacts(
        run=next(iter(run_ids.values())),
        stage=stage,
        last_stage=info.last_stage,
        artifact=artifacts[stage],
        artifacts=list(artifacts.values()),
        overrides=list(info.overrides),
        config_hash=info.config_hash,
        git=info.git,
    )


def split_config(config: Mapping[str, Any]) -> tuple[StageFacts, dict[str, Any]]:
    """Return the facts in a W&B run's config, and the run's resolved config.

    Raises:
        KeyError: when a fact is not there: the run is none of ours, or older than the facts.
    """
    names = [field.name for field in fields(StageFacts)]
    facts = StageFacts(**{name: config[name] for name in names})
    rest = {k: v for k, v in config.items() if k not in names and k not in DESCRIBED}
    return facts, rest


def numbers_so_far(models: Models, earlier: Models) -> dict[str, str]:
    """Return all of `results.json`'s `models` up to a stage, for its summary.

    Of a stage from the cache there is no W&B run to hold its numbers. They are one text, since W&B
    sorts the keys of what is nested, while roles and metrics have an order.
    """
    roles = dict.fromkeys([*earlier, *models])
    return {MODELS: json.dumps({r: {**earlier.get(r, {}), **models.get(r, {})} for r in roles})}
