"""What was seen: kept as CSV, and told in tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from tests.clients.libraries import APIS, CASES, LIBRARIES

__all__ = ["HEADINGS", "RESULTS", "Row", "keep", "kept", "short_table", "table"]

RESULTS = Path(__file__).parent / "results" / "clients.csv"
FIELDS = ("date", "commit", "library", "version", "api", "case", "verdict", "note")
HEADINGS: Mapping[str, tuple[str, ...]] = {
    "answer": ("chat",),
    "stream": ("stream",),
    "tools": ("tools", "tools_stream"),
    "JSON Schema": ("json",),
    "JSON by a call": ("json_by_call",),
    "errors": ("bad_model", "bad_key", "too_long"),
    "cancel": ("cancel",),
    "follow-up": ("follow_up",),
    "resume": ("resume",),
}
"""Columns of the table, each with the cases it is made of."""
# The worst first: a column says the worst of its cases.
WORDS = {
    "fail": "FAILS",
    "absent": "not offered yet",
    "refused": "refused",
    "ok": "yes",
    "none": "",
}

Row = dict[str, str]


def kept(path: Path = RESULTS) -> list[Row]:
    """Return what has been seen so far."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def keep(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Write rows, in the place of all that is kept of the same libraries."""
    new = list(rows)
    names = {row["library"] for row in new}
    everything = [row for row in kept(path) if row["library"] not in names] + new
    order = [library.name for library in LIBRARIES]
    everything = [row for row in everything if row["library"] in order]
    everything.sort(
        key=lambda row: (
            order.index(row["library"]),
            [*APIS].index(row["api"]),
            [*CASES].index(row["case"]),
        )
    )
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything)


def table(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Make one line of cells for each library and API: both names, then ``HEADINGS``."""
    for (library, api), group in groupby(rows, lambda row: (_named(row), row["api"])):
        yield [library, APIS[api], *_cells(list(group))]


def short_table(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Make one line of cells for each library, of all its APIs together."""
    for library, group in groupby(rows, _named):
        seen = list(group)
        apis = dict.fromkeys(APIS[row["api"]] for row in seen)
        yield [library, ", ".join(apis), *_cells(seen)]


def _named(row: Row) -> str:
    return f"{row['library']} {row['version']}"


def _cells(rows: Sequence[Row]) -> Iterator[str]:
    """Say for each heading the worst of its cases."""
    for cases in HEADINGS.values():
        verdicts = [row["verdict"] for row in rows if row["case"] in cases]
        yield WORDS[min(verdicts, key=[*WORDS].index, default="none")]
