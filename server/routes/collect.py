"""Answers that are sent whole: the turn's events are gathered first."""

from __future__ import annotations

from collections.abc import Callable

from server.events import Event
from server.turn import Turn

__all__ = ["collect"]


async def collect(turn: Turn, feed: Callable[[Event], object]) -> None:
    """Feed all events of a turn, up to the terminal one.

    If the client leaves before (the handler is cancelled), ``turn.detach()`` is called.
    """
    complete = False
    try:
        async for event in turn.follow():
            feed(event)
        complete = True
    finally:
        if not complete:
            turn.detach()
