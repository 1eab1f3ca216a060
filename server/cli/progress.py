"""Progress of a start: a bar on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich import progress
from rich.console import Console

__all__ = ["Progress"]


class Progress:
    """Shows how far a start is, as a context manager; ``update`` may come from any thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._stage = ""
        self._bar: progress.Progress | None = None
        if console.is_terminal:
            self._bar = progress.Progress(
                progress.SpinnerColumn(),
                progress.TextColumn("{task.description}", markup=False),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.TimeElapsedColumn(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task("starting", total=1.0)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, stage: str, fraction: float) -> None:
        """Say what is going on and which part of it, 0 to 1, is done."""
        if self._bar is not None:
            self._bar.update(self._task, description=stage, completed=fraction)
            return
        name = stage.partition(" (")[0]
        with self._lock:
            if name == self._stage:
                return
            self._stage = name
        self._console.print(f"millrace: {name}", markup=False, highlight=False)
