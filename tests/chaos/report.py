"""The reliability table: printed, and kept as CSV with date, commit and device."""

from __future__ import annotations

import csv
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.report import WIDTH, commit_name, device_name

__all__ = ["RESULTS", "show"]

RESULTS = Path(__file__).parent / "results"


def show(rows: Sequence[Mapping[str, object]], name: str = "reliability") -> Path:
    """Print the rows and keep them, in the place of those that have the same first column.

    Returns the file's path.
    """
    stamp = {"date": time.strftime("%Y-%m-%d"), "commit": commit_name(), "device": device_name()}
    columns = [*rows[0]]
    table = Table(title=f"{name} ({stamp['device']})", title_justify="left")
    for column in columns:
        table.add_column(
            column,
            justify="left" if column in (columns[0], columns[-1]) else "right",
            no_wrap=column == columns[0],
        )
    for row in rows:
        table.add_row(*(str(row[column]) for column in columns))
    Console(width=WIDTH).print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.csv"
    new = {row[columns[0]]: {**stamp, **row} for row in rows}
    kept: dict[object, Mapping[str, object]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            kept = {row[columns[0]]: row for row in csv.DictReader(file)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*stamp, *columns], extrasaction="ignore")
        writer.writeheader()
        writer.writerows((kept | new).values())
    return path
