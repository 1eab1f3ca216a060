"""What one client saw: every event with its time, and what happened to its connections."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, NamedTuple

from tests.chaos.questions import Question

__all__ = ["TERMINAL", "History", "Note", "Received"]

TERMINAL = frozenset(
    {"response.completed", "response.incomplete", "response.failed", "response.cancelled"}
)
DELTA = "response.output_text.delta"


class Received(NamedTuple):
    """One event as it arrived. ``at_s`` is ``time.monotonic()``."""

    at_s: float
    connection: int
    event: dict[str, Any]

    @property
    def number(self) -> int:
        """The event's sequence number."""
        return int(self.event["sequence_number"])

    @property
    def kind(self) -> str:
        """The event's type."""
        return str(self.event["type"])

    @property
    def is_text(self) -> bool:
        """It brings text."""
        return self.kind == DELTA


class Note(NamedTuple):
    """Something that is not an event: connected, lost, refused, asked again."""

    at_s: float
    what: str


@dataclasses.dataclass
class History:
    """A client's log, from its question to the terminal event, a refusal, or giving up."""

    question: Question
    transport: str
    began_s: float
    response_id: str | None = None
    received: list[Received] = dataclasses.field(default_factory=list)
    notes: list[Note] = dataclasses.field(default_factory=list)
    connections: int = 0
    moves: int = 0
    """Times that it went on at another address than the one before."""
    refused: str | None = None
    """A typed refusal that ended it: "404 response_not_found"."""
    gave_up: bool = False
    ended_s: float = 0.0

    @property
    def last_number(self) -> int | None:
        """The sequence number after which to resume."""
        return self.received[-1].number if self.received else None

    @property
    def terminal(self) -> Received | None:
        """The terminal event, once it came."""
        if self.received and self.received[-1].kind in TERMINAL:
            return self.received[-1]
        return None

    @property
    def num_tokens(self) -> int:
        """Tokens received."""
        return sum(len(one.event.get("token_ids") or ()) for one in self.received if one.is_text)

    def is_open_at(self, moment_s: float) -> bool:
        """Whether the answer was asked for, and its end not yet there."""
        end_s = self.ended_s if self.terminal is None else self.terminal.at_s
        return self.began_s < moment_s < end_s

    def silence_after_s(self, moment_s: float) -> float | None:
        """The longest time without text from ``moment_s`` to the end, in seconds.

        A refusal ends a silence as text does. None when nothing came after ``moment_s``.
        """
        moments = [
            one.at_s
            for one in self.received
            if one.at_s > moment_s and (one.is_text or one.kind in TERMINAL)
        ]
        if self.refused is not None:
            moments.append(max(moment_s, self.ended_s))
        if not moments:
            return None
        return max(b - a for a, b in itertools.pairwise([moment_s, *moments]))
