"""From the journal to tables: what is printed, and one CSV a part."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.bench.report import WIDTH, text_of
from tests.gpu.journal import Entry, State
from tests.gpu.parts import PARTS

__all__ = ["STAMP", "records_of", "show", "write_csv"]

STAMP = ("date", "commit", "device")
Record = dict[str, str]
"""Column -> text."""


def records_of(part: str, entries: Mapping[str, Entry]) -> list[Record]:
    """The rows of a part: figures, or why there are none. Nothing is left out."""
    records = []
    for name, entry in entries.items():
        if name.split("/")[0] != part:
            continue
        figures = {column: text_of(value) for column, value in entry.figures.items()}
        records.append({"row": name.partition("/")[2], **figures, "why not": _why_not(entry)})
    if part == "engine":
        _compare(records)
    return records


def _why_not(entry: Entry) -> str:
    if entry.state is State.DONE:
        return ""
    reason = entry.reason or "its process died"
    return f"{entry.state.value}: {reason}"


def _compare(records: list[Record]) -> None:
    """Set our tokens a second over the best peer's, of the same model and work."""
    best: dict[tuple[str, str], float] = {}
    for record in records:
        model, kind, work = _split(record)
        if kind.startswith("transformers") and record.get("tokens_per_s"):
            rate = float(record["tokens_per_s"])
            best[model, work] = max(rate, best.get((model, work), 0.0))
    for record in records:
        model, kind, work = _split(record)
        peer = best.get((model, work))
        if peer and not kind.startswith("transformers") and record.get("tokens_per_s"):
            record["times best peer"] = text_of(float(record["tokens_per_s"]) / peer)


def _split(record: Record) -> tuple[str, str, str]:
    """``8b-fp8-kv8/decode-1@1024`` -> model, mode and work."""
    group, _, work = record["row"].partition("/")
    models = sorted(("0.6b", "4b", "8b", "14b", "30b-a3b-dense"), key=len, reverse=True)
    model = next((name for name in models if group.startswith(f"{name}-")), group)
    return model, group.removeprefix(f"{model}-"), work


def columns_of(part: str) -> list[str]:
    """Columns of a part's table."""
    return ["row", *PARTS[part].columns, "took_s", "why not"]


def show(part: str, records: Iterable[Record], device: str) -> None:
    """Print a table."""
    table = Table(title=f"{part} ({device})", title_justify="left")
    for column in columns_of(part):
        side = "left" if column in ("row", "why not", "shown") else "right"
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for record in records:
        table.add_row(*(record.get(column, "") for column in columns_of(part)))
    Console(width=WIDTH).print(table)


def write_csv(part: str, records: list[Record], folder: Path, device: str, commit: str) -> Path:
    """Write ``gpu-PART.csv`` with date, commit and device, and return its path."""
    stamp = dict(zip(STAMP, (time.strftime("%Y-%m-%d"), commit, device), strict=True))
    path = folder / f"gpu-{part}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*STAMP, *columns_of(part)], extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**stamp, **record} for record in records)
    return path
