"""What became of every row, one line of JSON each, written as it happens.

A run that is stopped, killed or out of time leaves what it had measured; the next one goes on after
it. The process that measures writes; the one that watches it reads, and writes when it died.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from enum import Enum
from pathlib import Path
from typing import NamedTuple

__all__ = ["Entry", "Figures", "Journal", "State"]

Figures = dict[str, object]
"""Column -> number or text."""


class State(Enum):
    """What became of a row."""

    STARTED = "started"
    """It runs, or its process died."""
    DONE = "done"
    FAILED = "failed"
    """A check that did not hold, or an error of ours."""
    ABSENT = "absent"
    """It cannot be had here: a peer that is not installed or breaks, too little memory."""
    LEFT_OUT = "left out"
    """There was no time."""


class Entry(NamedTuple):
    """One line."""

    row: str
    state: State
    run: str
    """Names the run; rows that failed are tried again by the next."""
    at_s: float
    """Seconds since 1970."""
    limit_s: float
    """Of a started row: how long it may take."""
    reason: str
    """Why there are no figures."""
    figures: Figures


class Journal:
    """The file ``rows.jsonl`` of a folder.

    Args:
        path: need not be there yet.
        run: name of this run.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.run = run

    def write(
        self,
        row: str,
        state: State,
        *,
        reason: str = "",
        figures: Figures | None = None,
        limit_s: float = 0.0,
    ) -> None:
        """Append a line."""
        entry = Entry(row, state, self.run, time.time(), limit_s, reason, figures or {})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry._asdict(), "state": state.value}) + "\n")

    def last(self) -> dict[str, Entry]:
        """The last line of each row, in the order in which rows first appeared."""
        return dict(self._named(self._lines()))

    def settled(self) -> set[str]:
        """Rows that need no further try in this run."""
        return {
            name
            for name, entry in self.last().items()
            if entry.state in (State.DONE, State.ABSENT)
            or (entry.state is State.FAILED and entry.run == self.run)
        }

    def _lines(self) -> Iterable[str]:
        return self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else ()

    @staticmethod
    def _named(lines: Iterable[str]) -> Iterable[tuple[str, Entry]]:
        for line in lines:
            try:
                fields = json.loads(line)
            except ValueError:
                continue  # the writer was killed amid it
            entry = Entry(**{**fields, "state": State(fields["state"])})
            yield entry.row, entry
