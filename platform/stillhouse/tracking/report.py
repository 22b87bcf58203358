"""What a run says when it is over: its table, its curves, where everything lies."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from stillhouse.files import SERIES
from stillhouse.tracking.runs import RunRecord
from stillhouse.tracking.series import read_series

# What a column of a table takes besides its text.
BORDER = 3


def print_outcome(record: RunRecord, console: Console) -> None:
    """Draw a run's curves, print its table and say where everything lies."""
    from stillhouse.tracking.pictures import curves_of, draw_curves

    folder = record.folder
    if record.models:
        print_results(record.info.recipe, record.models, console)
    rows = read_series(folder / SERIES) if (folder / SERIES).exists() else []
    if rows:
        title = f"{record.info.recipe}, seed {record.info.seed}"
        draw_curves(curves_of(rows), folder / "pictures" / "loss.png", title)
    drawn = collect_pictures(folder)
    console.print(f"run directory: {folder}")
    left = [
        ("student", "the student, an ordinary model folder"),
        ("pictures/loss.png", "the loss curves"),
        *((f"pictures/{name}", f"drawn by the stage {stage}") for name, stage in drawn.items()),
        ("results.json", "final numbers"),
        (SERIES, "step series"),
        ("config.yaml", "the resolved config"),
        ("stages", "every stage's artifact"),
        ("stages/evaluate/samples.json", "continuations of the prompts, by model"),
    ]
    left = [(name, what) for name, what in left if (folder / name).exists()]
    width = max((len(name) for name, _ in left), default=0)
    for name, what in left:
        console.print(f"  {name:<{width}}  {what}")
    if (folder / "wandb").exists():
        console.print(f"  {'wandb':<{width}}  send with: wandb sync {folder}/wandb/offline-run-*")


def collect_pictures(folder: Path) -> dict[str, str]:
    """Copy what stages drew to the run's pictures; return file name -> stage."""
    drawn = {}
    for path in sorted((folder / "stages").glob("*/*.png")):
        stage = path.parent.name
        name = f"{stage}.png" if path.stem in stage else f"{stage}_{path.name}"
        (folder / "pictures").mkdir(exist_ok=True)
        shutil.copyfile(path, folder / "pictures" / name)
        drawn[name] = stage
    return drawn


def print_results(title: str, models: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """Print a row a metric and a column a role, in as many tables as the terminal's width asks."""
    metrics = list(dict.fromkeys(m for numbers in models.values() for m in numbers))
    columns = {
        role: [role, *(format_number(numbers.get(metric)) for metric in metrics)]
        for role, numbers in models.items()
    }
    taken = 0
    parts: list[list[str]] = [[]]
    for role, cells in columns.items():
        width = max(map(len, cells)) + BORDER
        if parts[-1] and taken + width > console.width:
            parts.append([])
        taken = width + (taken if parts[-1] else max(map(len, ["metric", *metrics])) + BORDER + 1)
        parts[-1].append(role)
    for part in parts:
        table = Table(Column("metric", no_wrap=True), title=title)
        for role in part:
            table.add_column(role, justify="right", no_wrap=True)
        for i, metric in enumerate(metrics, start=1):
            table.add_row(metric, *(columns[role][i] for role in part))
        console.print(table)


def format_number(value: Any) -> str:
    """Show a number with four digits that count, a count in full."""
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
