"""A stage that is run in a folder, outside of any recipe."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from stillhouse.stages.stage import StageContext, StageResult
from stillhouse.tracking.tracker import FileTracker


def metrics_of(
    stage: Callable[[StageContext], StageResult], name: str, folder: Path
) -> dict[str, Any]:
    """Run a stage, which leaves its artifact in a new folder; return its metrics."""
    folder.mkdir()
    context = StageContext(name, folder, folder, FileTracker(None), Console(file=io.StringIO()))
    return dict(stage(context).metrics)
