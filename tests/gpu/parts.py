"""Rows in groups, and the loop that measures those of one part."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, NamedTuple

from tests.bench.open_loop import COLUMNS as OPEN_LOOP
from tests.gpu.journal import Figures, Journal, State
from tests.gpu.setting import Setting

__all__ = [
    "PARTS",
    "Absent",
    "Group",
    "Part",
    "Row",
    "load_groups",
    "name_of",
    "run_part",
    "wanted_rows",
]


class Absent(Exception):
    """Raised by a row that cannot be had here, with the reason; not a failure."""


@dataclass(frozen=True)
class Row:
    """One line of a table."""

    name: str
    run: Callable[[Any], Figures]
    """Gets what its group opened. AssertionError: a check does not hold."""
    default: bool = True
    """Part of what is run when nothing is named."""
    needs_s: float = 5.0
    """Not begun with less time left."""
    limit_s: float = 120.0
    """Killed after so long."""


@dataclass(frozen=True)
class Group:
    """Rows that share something that is slow to make."""

    name: str
    rows: tuple[Row, ...]
    open: Callable[[Setting], AbstractContextManager[Any]] = contextlib.nullcontext
    """Makes what the rows get; without it, the setting."""
    needs_s: float = 5.0
    is_peer: bool = False
    """Of others: what goes wrong is a reason for no figures, not a failure."""


class Part(NamedTuple):
    """Where a part's groups come from and what its table shows."""

    module: str
    """Has ``groups(setting) -> list[Group]``."""
    columns: tuple[str, ...]
    share: float
    """Of the time, when all parts run; 0: only when asked for."""


PARTS = {
    "checks": Part("tests.gpu.checks", ("shown",), 27),
    "kernels": Part(
        "tests.gpu.kernels",
        ("us", "GB/s", "TFLOP/s", "share", "torch us", "compiled us", "flex us", "flashinfer us",
         "times best peer", "error", "timed by"),
        24,
    ),
    "engine": Part(
        "tests.gpu.engine",
        ("tokens_per_s", "step_ms", "first_ms", "GiB", "KiB a token", "times best peer"),
        37,
    ),
    "serve": Part("tests.gpu.serve", OPEN_LOOP, 12),
    "tuning": Part("tests.gpu.tuning", ("ops", "file"), 0),
}  # fmt: skip


def load_groups(part: str, setting: Setting) -> list[Group]:
    """The groups of a part; imports what it measures."""
    groups: list[Group] = importlib.import_module(PARTS[part].module).groups(setting)
    return groups


def name_of(part: str, group: Group, row: Row) -> str:
    """The name under which a row is asked for and kept."""
    return f"{part}/{group.name}/{row.name}"


def _is_wanted(name: str, row: Row, patterns: list[str], everything: bool) -> bool:
    if patterns:
        return any(fnmatch(name, pattern) for pattern in patterns)
    return row.default or everything


def wanted_rows(
    part: str, groups: list[Group], patterns: list[str], everything: bool
) -> Iterator[tuple[Group, list[Row]]]:
    """Each group with those of its rows that were asked for, if any."""
    for group in groups:
        rows = [
            row
            for row in group.rows
            if _is_wanted(name_of(part, group, row), row, patterns, everything)
        ]
        if rows:
            yield group, rows


def run_part(
    part: str, setting: Setting, journal: Journal, patterns: list[str], everything: bool
) -> None:
    """Run the wanted rows that are not settled yet, as long as there is time."""
    settled = journal.settled()
    wanted = [
        (group, {name: row for row in rows if (name := name_of(part, group, row)) not in settled})
        for group, rows in wanted_rows(part, load_groups(part, setting), patterns, everything)
    ]
    for _, open_rows in wanted:
        _leave_out(journal, open_rows)  # until they are reached
    for group, open_rows in wanted:
        if not open_rows:
            continue
        if setting.left_s < group.needs_s:
            _leave_out(journal, open_rows)
            continue
        _run_group(journal, setting, group, open_rows)
        setting.forget()  # now that nothing here refers to what the group opened


def _run_group(journal: Journal, setting: Setting, group: Group, rows: dict[str, Row]) -> None:
    # Whatever happens while the group is opened happens to its first row.
    first, row = next(iter(rows.items()))
    journal.write(first, State.STARTED, limit_s=max(group.needs_s * 3, row.limit_s))
    with contextlib.ExitStack() as stack:
        try:
            subject = stack.enter_context(group.open(setting))
        except Exception as error:
            for name in rows:
                _note(journal, name, error, is_peer=group.is_peer)
            return
        for name, row in rows.items():
            _run_row(journal, setting, name, row, subject, is_peer=group.is_peer)


def _run_row(
    journal: Journal, setting: Setting, name: str, row: Row, subject: Any, *, is_peer: bool
) -> None:
    if setting.left_s < row.needs_s:
        _leave_out(journal, {name: row})
        return
    journal.write(name, State.STARTED, limit_s=row.limit_s)
    started = time.monotonic()
    try:
        figures = row.run(subject)
    except Exception as error:
        _note(journal, name, error, is_peer=is_peer)
        if _is_fatal(error):
            # A device that had an illegal access answers nothing any more in this process.
            os._exit(3)
        return
    took_s = round(time.monotonic() - started, 2)
    journal.write(name, State.DONE, figures={**figures, "took_s": took_s})
    print(f"{name}: {figures} in {took_s} s", flush=True)


def _leave_out(journal: Journal, rows: dict[str, Row]) -> None:
    for name in rows:
        journal.write(name, State.LEFT_OUT, reason="no time left")


def _note(journal: Journal, name: str, error: Exception, *, is_peer: bool) -> None:
    known = isinstance(error, Absent)
    reason = " ".join(f"{'' if known else f'{type(error).__name__}: '}{error}".split())[:300]
    if not known:
        traceback.print_exception(error)
    state = State.ABSENT if known or is_peer else State.FAILED
    journal.write(name, state, reason=reason)
    print(f"{name}: {state.value}, {reason}", flush=True)


def _is_fatal(error: Exception) -> bool:
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"
