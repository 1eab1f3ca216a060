"""Put the kept results into the README: ``python -m tests.chaos.readme``."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

from tests.chaos.report import RESULTS
from tests.chaos.scenarios import SCENARIOS

__all__ = ["README", "between_marks", "with_tables"]

README = Path(__file__).parents[2] / "README.md"


def between_marks(text: str, name: str, lines: Iterable[str]) -> str:
    """Return a document with other lines between its marks of a name."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = text.split(begin)
    _, after = rest.split(end)
    return f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}"


def with_tables(text: str) -> str:
    """Return the README's text with the tables of the kept results between its marks."""
    return between_marks(text, "reliability", [*_reliability(), "", *_fuzz(), *_scheduler()])


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _reliability() -> Iterator[str]:
    yield (
        "| what is done amid answers | times | answers | whole | lost, doubled, reordered | "
        "hung, silent | text again, median / 99 % / longest | |"
    )
    yield "|---|---:|---:|---:|---|---|---|---|"
    rows = {row["scenario"]: row for row in _rows("reliability")}
    for name, scenario in SCENARIOS.items():
        if (row := rows.get(name)) is None:
            continue
        again = " / ".join(
            f"{float(row[f'back {share} s']):.2f}" for share in ("p50", "p99", "max")
            if row[f"back {share} s"]
        )  # fmt: skip
        more = [row["measured"]] if row["measured"] else []
        if int(row["moved"]):
            more.append(f"{int(row['moved']):,} resumed at another server")
        if int(row["said lost"]):
            more.append(f"{int(row['said lost']):,} times the store had lost events, and said so")
        yield (
            f"| {scenario.about} (`{name}`) | {int(row['events']):,} | {int(row['clients']):,} "
            f"| {row['whole %']} % | {row['lost']}, {row['doubled']}, {row['reordered']} "
            f"| {row['hung']}, {row['silent']} | {f'{again} s' if again else ''} "
            f"| {'; '.join(more)} |"
        )


def _fuzz() -> Iterator[str]:
    for row in _rows("fuzz"):
        yield (
            f"- {int(row['sent']):,} mutated {row['inputs']}: {row['5xx']} answered with 5xx, "
            f"{int(row['refused']):,} refused, memory {row['memory']}."
        )


def _scheduler() -> Iterator[str]:
    for row in _rows("scheduler"):
        yield (
            f"- {int(row['runs']):,} random runs of the {row['what']}, checked after every step: "
            f"{int(row['answers']):,} answers, {int(row['preemptions']):,} preemptions, "
            f"{row['verdict']}."
        )


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
