"""The job `compare`: a table over runs, differences to a baseline, the curves, the trade-off.

Beside the table and the pictures, one page holds all of it (`page`).

Reading (`gather`), folding (`folding`, `baselines`, `tradeoff`) and writing (here) are apart: what
is written is a function of records, whatever the form.
"""

import csv
import math
import os
import re
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from stillhouse.errors import UserError
from stillhouse.files import RESULTS
from stillhouse.tracking import folding
from stillhouse.tracking.baselines import choose_baseline
from stillhouse.tracking.folding import Cell, Group
from stillhouse.tracking.gather import find_folders, read_runs
from stillhouse.tracking.intervals import Estimate
from stillhouse.tracking.page.page import REPORT, page
from stillhouse.tracking.page.records import make_report
from stillhouse.tracking.report import format_number
from stillhouse.tracking.tradeoff import TradeOff, choose_quality, trade_off
from stillhouse.tracking.wandb_report import (
    check_report,
    make_wandb_report,
    save_wandb_report,
)
from stillhouse.tracking.wandb_source import SCHEME, read_sources

CURVE = "val_nll"
CSV_COLUMNS = ("group", "role", "metric", "mean", "sd", "n", "difference", "low", "high", "pairs")


@dataclass(frozen=True)
class Sheet:
    """A table as text, the first two columns group and role."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def compare_runs(config: DictConfig, folder: Path) -> None:
    """Compare the runs that `config` names; write the table, the page and the pictures.

    Args:
        config: a `schema.Comparison`.
        folder: unused; the job leaves no run directory.

    Raises:
        UserError: when an entry of `runs` leads to no run, no run is finished, or a metric, the
            baseline or the folder `to` cannot be used.
    """
    console = Console(highlight=False, soft_wrap=True)
    if OmegaConf.is_missing(config, "runs") or not config.runs:
        raise UserError("runs: name the runs to compare, such as 'runs=[outputs/word_kd/*]'")
    entries = _entries(config.runs)
    if config.publish:
        check_report()
    folders = find_folders([e for e in entries if not e.startswith(SCHEME)])
    runs, warnings = read_runs(folders)
    further, more = read_sources([e for e in entries if e.startswith(SCHEME)])
    runs, warnings = [*runs, *further], [*warnings, *more]
    if not runs:
        _warn(warnings, console)
        raise UserError(
            f"runs: none of the runs of {', '.join(entries)} can be compared; looked for a "
            f"{RESULTS}, or a run at W&B, with status done and numbers of models"
        )
    groups, older = folding.group_runs(runs)
    metrics = folding.choose_metrics(groups, config.metrics, config.x, config.y)
    baseline = choose_baseline(groups, config.baseline)
    cells, gaps = folding.fold(groups, metrics, baseline), []
    warnings += older
    if baseline is not None and baseline.role is not None and folding.GAP_METRIC in metrics:
        gaps, without_gap = folding.close_gaps(groups, baseline.role)
        warnings += without_gap
    if baseline is not None and not any(c.difference for c in cells):
        warnings.append(f"baseline={baseline.text}: no other row has a pair in it (same seed)")

    sheets = [main_sheet(cells, metrics)]
    if any(c.difference for c in cells):
        sheets.append(difference_sheet([*cells, *gaps], config.baseline))
    chart, without_chart = _chart(groups, metrics, config.x, config.y)
    warnings += without_chart
    _warn(warnings, console)
    for sheet in sheets:
        print_sheet(sheet, console)
    used = sum(len(group.runs) for group in groups)
    command = command_line(config)
    first_line = f"{used} run{'s' if used != 1 else ''}; made by `{command}`"
    to = Path(config.to).expanduser()
    report = make_report(
        groups,
        [*cells, *gaps],
        metrics,
        quality=choose_quality(metrics, config.x, config.y),
        x=config.x,
        baseline=config.baseline,
        command=command,
        warnings=warnings,
        to=to,
    )

    tables = markdown(first_line, sheets, warnings, [])
    online = make_wandb_report(report, tables) if config.publish else None

    def write(target: Path) -> None:
        write_csv([*cells, *gaps], target / "compare.csv")
        draw(groups, chart, target / _picture(config.x, config.y))
        pictures = sorted(p.name for p in target.glob("*.png"))
        text = markdown(first_line, sheets, warnings, pictures)
        (target / "compare.md").write_text(text, encoding="utf-8")
        (target / REPORT).write_text(page(report), encoding="utf-8")

    names = publish(write, to)
    console.print(Text(f"{to}: {', '.join(names)}"))
    console.print(Text(f"open {to / REPORT} in a browser: all of it on one page"))
    if online is not None:
        console.print(Text(f"published at W&B: {save_wandb_report(online)}"))


def _entries(runs: Any) -> list[str]:
    """Return the entries of `runs`, which may be a single one."""
    entries = [runs] if isinstance(runs, str) else runs
    if not isinstance(entries, Sequence) or not all(isinstance(e, str) for e in entries):
        raise UserError(f"runs: {runs}: expected run directories, or wandb:<entity>/<project>/…")
    return list(entries)


def main_sheet(cells: Sequence[Cell], metrics: Sequence[str]) -> Sheet:
    """Lay out mean ± sd (n), a row a (group, role)."""
    found = {(c.group, c.role, c.metric): _spread(c.value) for c in cells}
    return _sheet("mean ± sample standard deviation (runs)", metrics, found)


def difference_sheet(cells: Sequence[Cell], baseline: str) -> Sheet:
    """Lay out the differences to the baseline, and how much of the gap is closed."""
    found = {}
    for cell in cells:
        shown = cell.value if cell.metric == folding.GAP_CLOSED else cell.difference
        if shown is not None:
            found[cell.group, cell.role, cell.metric] = _interval(shown)
    metrics = list(dict.fromkeys(metric for _, _, metric in found))
    title = f"difference to {baseline}, paired by seed: mean [95 % t interval] (pairs)"
    return _sheet(title, metrics, found)


def _sheet(title: str, metrics: Sequence[str], found: dict[tuple[str, str, str], str]) -> Sheet:
    rows = dict.fromkeys((group, role) for group, role, _ in found)
    return Sheet(
        title,
        ("group", "role", *metrics),
        tuple((g, r, *(found.get((g, r, m), "") for m in metrics)) for g, r in rows),
    )


def _spread(value: Estimate) -> str:
    sd = f" ± {format_number(value.sd)}" if value.sd is not None else ""
    return f"{format_number(value.mean)}{sd} ({value.n})"


def _interval(value: Estimate) -> str:
    sign = "+" if value.mean > 0 else ""
    ends = f" [{format_number(value.low)}, {format_number(value.high)}]" if value.n > 1 else ""
    return f"{sign}{format_number(value.mean)}{ends} ({value.n})"


def print_sheet(sheet: Sheet, console: Console) -> None:
    """Print a table; columns that a terminal has no room for go into a further one."""
    widths = [max(map(len, column)) + 3 for column in zip(sheet.columns, *sheet.rows, strict=True)]
    room = console.width if console.is_terminal else math.inf
    parts: list[list[int]] = [[0, 1]]
    for index in range(2, len(sheet.columns)):
        if len(parts[-1]) > 2 and sum(widths[i] for i in [*parts[-1], index]) >= room:
            parts.append([0, 1])
        parts[-1].append(index)
    for part in parts:
        # Without a width of its own, a table is squeezed into 80 columns where output is a file.
        table = Table(title=Text(sheet.title), width=sum(widths[i] for i in part) + 1)
        for i in part:
            justify = "left" if i < 2 else "right"
            table.add_column(Text(sheet.columns[i]), justify=justify, no_wrap=True)
        for row in sheet.rows:
            table.add_row(*(Text(row[i]) for i in part))
        console.print(table)


def _warn(warnings: Sequence[str], console: Console) -> None:
    for line in warnings:
        console.print(Text.assemble(("warning:", "yellow"), " ", line))


def markdown(
    first_line: str, sheets: Sequence[Sheet], warnings: Sequence[str], pictures: Sequence[str]
) -> str:
    """Return the comparison as a Markdown page."""
    blocks = [first_line]
    for sheet in sheets:
        aligned = ["---", "---", *("---:" for _ in sheet.columns[2:])]
        lines = ["| " + " | ".join(row) + " |" for row in map(_escaped, sheet.rows)]
        head = "| " + " | ".join(_escaped(sheet.columns)) + " |"
        blocks += [f"## {sheet.title}", "\n".join([head, f"| {' | '.join(aligned)} |", *lines])]
    if warnings:
        blocks += ["## Left out", "\n".join(f"- {line}" for line in warnings)]
    blocks += [f"![{Path(name).stem}]({name})" for name in pictures]
    return "\n\n".join(blocks) + "\n"


def _escaped(row: Sequence[str]) -> list[str]:
    return [cell.replace("|", "\\|") for cell in row]


def command_line(config: DictConfig) -> str:
    """Return the command that makes this comparison, quoted for Hydra and for the shell."""
    words = [f"runs=[{','.join(map(_for_hydra, _entries(config.runs)))}]"]
    if config.baseline is not None:
        words.append(f"baseline={_for_hydra(config.baseline)}")
    if config.metrics is not None:
        words.append(f"metrics=[{','.join(map(_for_hydra, config.metrics))}]")
    if config.x != folding.SIZE:
        words.append(f"x={_for_hydra(config.x)}")
    if config.y is not None:
        words.append(f"y={_for_hydra(config.y)}")
    words.append(f"to={_for_hydra(config.to)}")
    return shlex.join(["python", "run.py", "--config-name", "compare", *words])


def _for_hydra(value: str) -> str:
    """Quote what Hydra's grammar would not read as this very string."""
    plain = re.fullmatch(r"[A-Za-z_/][\w/.*?@%+-]*", value, re.ASCII)
    if plain and value.lower() not in ("null", "true", "false", "nan", "inf"):
        return value
    # Backslashes count as escapes only in front of a quote.
    return '"' + re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value) + '"'


def write_csv(cells: Sequence[Cell], path: Path) -> None:
    """Write one row a cell; `low` and `high` bound the difference, or the gap closed."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        for c in cells:
            change = c.difference
            bounds = c.value if c.metric == folding.GAP_CLOSED else change
            last = (bounds.low, bounds.high, bounds.n) if bounds else (None, None, None)
            row = (c.group, c.role, c.metric, c.value.mean, c.value.sd, c.value.n)
            writer.writerow([*row, change.mean if change else None, *last])


def _picture(x: str, y: str | None) -> str:
    return f"{y or 'quality'}_against_{x}.png"


def _chart(
    groups: Sequence[Group], metrics: Sequence[str], x: str, y: str | None
) -> tuple[TradeOff | None, list[str]]:
    """Return what the picture shows, or None, and a line if it was asked for."""
    quality = choose_quality(metrics, x, y)
    chart = trade_off(groups, x, quality) if quality else None
    if chart is not None and (chart.curves or chart.points):
        return chart, []
    if x == folding.SIZE and y is None:
        return None, []
    reason = f"no model has {x} and {quality}" if quality else "name a metric with y=<metric>"
    return None, [f"{_picture(x, y)} is left out: {reason}"]


def draw(groups: Sequence[Group], chart: TradeOff | None, path: Path) -> None:
    """Draw the chart to `path` and the curves of training beside it, where there are any."""
    from stillhouse.tracking.pictures import draw_bands, draw_trade_off

    bands = folding.short_labels(folding.fold_curves(groups, CURVE))
    if bands:
        draw_bands(bands, CURVE, path.with_name("loss.png"), f"{CURVE}: mean and range over seeds")
    if chart is not None:
        draw_trade_off(chart, path)


def publish(write: Callable[[Path], None], to: Path) -> list[str]:
    """Write files aside and move them to `to` once all of them are whole; return their names.

    Raises:
        UserError: when the folder cannot be made or written to.
    """
    try:
        to.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=to, prefix=".compare.") as aside:
            write(Path(aside))
            names = sorted(p.name for p in Path(aside).iterdir())
            for name in names:
                os.replace(Path(aside) / name, to / name)
    except OSError as error:
        raise UserError(
            f"to={to}: cannot be written: {error.strerror or error}; choose another folder with "
            "to=<folder>"
        ) from error
    return names
