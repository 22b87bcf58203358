"""Step series as a CSV file: a row for every number, (stage, step, metric, value)."""

import csv
from collections.abc import Iterable
from pathlib import Path

COLUMNS = ("stage", "step", "metric", "value")


def append_rows(path: Path, rows: Iterable[tuple[str, int | None, str, float]]) -> None:
    """Append rows, the header first where the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerows(rows)


def read_series(path: Path) -> list[tuple[str, int, str, float]]:
    """Read the rows of a series; a last line that was cut short is left out."""
    rows = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                rows.append((row["stage"], int(row["step"]), row["metric"], float(row["value"])))
            except (TypeError, ValueError):
                continue
    return rows
