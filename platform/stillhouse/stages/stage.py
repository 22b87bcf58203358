"""What a stage is: a callable that gets a context and leaves an artifact and metrics behind."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.console import Console

from stillhouse.stages.artifacts import Number
from stillhouse.tracking.tracker import StageTracker


@dataclass(frozen=True)
class StageContext:
    """Where one stage works.

    Attributes:
        name: key of the stage in the recipe's `stages`.
        output: empty folder; what the stage leaves in it becomes its artifact.
        scratch: folder that survives a kill, for checkpoints and shards.
        tracker: where series, tables and pictures of this stage are logged.
        console: where the stage speaks to its user.
    """

    name: str
    output: Path
    scratch: Path
    tracker: StageTracker
    console: Console


@dataclass(frozen=True)
class StageResult:
    """What a stage measured.

    Attributes:
        metrics: numbers about the stage itself, units in the names.
        models: numbers about models, by role (a row of the recipe's table), units in the names.
    """

    metrics: Mapping[str, Number] = field(default_factory=dict)
    models: Mapping[str, Mapping[str, Number]] = field(default_factory=dict)


class Stage(Protocol):
    """A stage: built from its YAML node when its turn comes, then called once."""

    def __call__(self, context: StageContext) -> StageResult:
        """Do the work, write the artifact to `context.output`, return what was measured."""
        ...
