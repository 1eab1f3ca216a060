"""What was seen: kept as CSV, and told in a table with one row for each library and API."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from tests.clients.libraries import APIS, CASES, LIBRARIES

__all__ = ["HEADINGS", "RESULTS", "Row", "keep", "kept", "table"]

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
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        line = lines.setdefault((row["library"], row["version"], row["api"]), {})
        line[row["case"]] = row["verdict"]
    for (library, version, api), verdicts in lines.items():
        cells = [_cell(verdicts, cases) for cases in HEADINGS.values()]
        yield [f"{library} {version}", APIS[api], *cells]


def _cell(verdicts: Mapping[str, str], cases: Sequence[str]) -> str:
    return WORDS[min((verdicts.get(case, "none") for case in cases), key=[*WORDS].index)]
