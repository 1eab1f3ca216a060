"""Places in a projected stream: what a client sends back to go on where it was cut, sans-I/O.

The frames of Chat Completions and Completions are made of events; one event makes none, one or
several. A frame's ``id`` is ``<stream id>:<event>`` for the last frame of an event, and
``<stream id>:<event>.<count>`` for one before it: whoever has that one has ``count`` of its frames.
The stream's id in it tells the streams of one client apart; a bare ``<event>`` is read too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from server.events import TERMINAL_EVENTS, Discontinuity, Event
from server.transports.sse import Frame

__all__ = ["START", "Placed", "Position", "read_position", "stream_id_of", "turn_id_of"]

_POSITION = re.compile(r"(?:([a-z]+-[0-9a-f]{32}):)?(\d{1,15})(?:\.(\d{1,3}))?", re.ASCII)
_STREAM_ID = re.compile(r"[a-z]+-([0-9a-f]{32})", re.ASCII)


class Position(NamedTuple):
    """All frames of the events before ``event`` were received, and ``frames`` of its own."""

    event: int = 0
    frames: int = 0


START = Position()


def read_position(text: str, stream_id: str) -> Position | None:
    """Return the place that an ``id`` names; None if it is not one of ``stream_id``'s."""
    found = _POSITION.fullmatch(text)
    if found is None or found[1] not in (None, stream_id):
        return None
    number = int(found[2])
    return Position(number + 1) if found[3] is None else Position(number, int(found[3]))


def stream_id_of(prefix: str, turn_id: str) -> str:
    """Return the id that a turn has in a dialect whose ids begin with ``prefix``."""
    # The rest of the turn's own id: a stream can be found again by the id it shows.
    return f"{prefix}-{turn_id.partition('_')[2]}"


def turn_id_of(prefix: str, stream_id: str) -> str | None:
    """Return the turn that a dialect's id names; None if it is no such id."""
    found = _STREAM_ID.fullmatch(stream_id)
    if found is None or not stream_id.startswith(f"{prefix}-"):
        return None
    return f"resp_{found[1]}"


class Placed:
    """Gives each frame of a projection its id, and leaves out those before ``begin``.

    The projection still sees all events: what a frame says may depend on those before it. After a
    terminal event, or a gap in the log, nothing more is said.
    """

    def __init__(
        self,
        project: Callable[[Event], Iterable[Frame]],
        stream_id: str,
        begin: Position = START,
    ) -> None:
        self._project = project
        self._stream_id = stream_id
        self._begin = begin
        self._over = False

    def feed(self, event: Event) -> Iterator[Frame]:
        """Yield the frames that show an event."""
        if self._over:
            return
        self._over = isinstance(event, (*TERMINAL_EVENTS, Discontinuity))
        number = event.sequence_number
        frames = list(self._project(event))
        for count, frame in enumerate(frames, start=1):
            if Position(number, count - 1) < self._begin:
                continue
            place = f"{number}" if count == len(frames) else f"{number}.{count}"
            yield frame._replace(id=f"{self._stream_id}:{place}")
