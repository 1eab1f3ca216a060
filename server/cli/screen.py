"""What the terminal chat shows: Markdown that grows, and lines about it."""

from __future__ import annotations

import re
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.spinner import Spinner

from server.cli.dialogue import Answer, Phase, split_finished

__all__ = ["GrowingAnswer", "plain_answer", "without_controls"]

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_FRAMES_PER_S = 12


def without_controls(text: str) -> str:
    """Return ``text`` with nothing in it that could steer a terminal; tabs and line ends stay."""
    return _CONTROLS.sub("\ufffd", text)


class _Tail:
    """The last screenful of a Markdown text."""

    def __init__(self, text: str) -> None:
        self._markdown = Markdown(text)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        lines = console.render_lines(self._markdown, options, pad=False)
        for line in lines[-max(1, console.height - 2) :]:
            yield from line
            yield Segment.line()


class GrowingAnswer:
    """Shows one answer while it comes in, as a context manager.

    Blocks that can no longer change are printed for good; only what is behind them is drawn anew,
    so a long answer costs no more for each token than a short one.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tail = ""
        self._live = Live(
            Spinner("dots"), console=console, refresh_per_second=_FRAMES_PER_S, transient=True
        )

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.update("", refresh=True)
        self._live.stop()
        if self._tail.strip():
            self._console.print(Markdown(self._tail))
        self._tail = ""

    def add(self, text: str) -> None:
        """Show more text."""
        finished, self._tail = split_finished(self._tail + without_controls(text))
        # Printing draws the live part again as it was at its last refresh, so that comes first.
        if self._tail.strip():
            self._live.update(_Tail(self._tail), refresh=bool(finished))
        if finished.strip():
            self._live.console.print(Markdown(finished))
            self._live.console.print()

    def note(self, text: str) -> None:
        """Print a line about what is going on."""
        self._live.console.print(f"[yellow]{text}[/]", highlight=False)

    def call(self, line: str) -> None:
        """Print what a tool was asked and said, behind the text that came before it."""
        tail, self._tail = self._tail, ""
        self._live.update(Spinner("dots"), refresh=True)
        if tail.strip():
            self._live.console.print(Markdown(tail))
        self._live.console.print(without_controls(line), style="dim", markup=False, highlight=False)


def plain_answer(out: TextIO, text: str, *, to_terminal: bool) -> None:
    """Write text as it is; on a terminal, without what could steer it."""
    out.write(without_controls(text) if to_terminal else text)
    out.flush()


def closing_line(console: Console, answer: Answer) -> None:
    """Print how an answer ended."""
    if answer.phase in (Phase.FAILED, Phase.REFUSED):
        console.print(f"error: {answer.problem}", style="red", markup=False, highlight=False)
    if summary := answer.summary():
        console.print(summary, style="dim", markup=False, highlight=False)
    console.print()
