"""Progress of an evaluation: a bar for each part on a terminal, a line for each in a log file."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

__all__ = ["stage"]


@contextmanager
def stage(console: Console, title: str, total: int) -> Iterator[Callable[[], None]]:
    """Shows a part of `total` steps while it runs; what it yields is called after each step."""
    started = time.monotonic()
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)
    if not console.is_terminal:
        took_s = time.monotonic() - started
        console.print(f"{title}: {total} in {took_s:.0f} s", highlight=False, soft_wrap=True)
