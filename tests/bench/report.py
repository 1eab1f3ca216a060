"""Show and keep figures: a table in the terminal, a CSV with date, commit, device and load."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

__all__ = ["RESULTS", "WIDTH", "Report", "commit_name", "device_name", "text_of"]

RESULTS = Path(__file__).parent / "results"
WIDTH = 210


def device_name() -> str:
    """Return the processor's name and the number of cores this process may use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def commit_name() -> str:
    """Return the commit that is checked out, marked where files differ from it."""
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return run.stdout.strip() or "unknown"


class Report:
    """Rows of one benchmark. ``add`` prints nothing; ``show`` prints and writes everything."""

    def __init__(self, name: str, columns: Sequence[str]) -> None:
        self.name = name
        self.columns = list(columns)
        self.rows: list[dict[str, str]] = []

    def add(self, **figures: object) -> None:
        """Add a row; floats keep three significant digits or whole numbers when large."""
        self.rows.append({key: text_of(value) for key, value in figures.items()})

    def show(self, device: str | None = None) -> Path:
        """Print the table and write the CSV, whose path it returns."""
        device = device or device_name()
        stamp: Mapping[str, str] = {
            "date": time.strftime("%Y-%m-%d"),
            "commit": commit_name(),
            "device": device,
            # Above what the benchmark itself keeps busy, others disturbed it.
            "load": f"{os.getloadavg()[0]:.1f}",
        }
        table = Table(title=f"{self.name} ({device})", title_justify="left")
        for column in self.columns:
            table.add_column(column, justify="right" if column != self.columns[0] else "left")
        for row in self.rows:
            table.add_row(*(row.get(column, "") for column in self.columns))
        # Into a file or a pipe, whole: cut columns tell nothing.
        Console(width=None if sys.stdout.isatty() else WIDTH).print(table)
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*stamp, *self.columns])
            writer.writeheader()
            writer.writerows({**stamp, **row} for row in self.rows)
        return path


def text_of(value: object) -> str:
    """A figure for a table: three significant digits, or whole where it is large."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)
