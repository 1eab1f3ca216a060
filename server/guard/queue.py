"""Turns that wait for their first token: how many may, whose turn it is, and how long it will take.

The engine shares its work between keys by weight (see ``engine.fairness``). So a key's wait is made
of its own backlog, and a queue that one key has filled refuses that key, not the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from engine import EngineStats
from server.errors import ApiError
from server.metering.pace import Pace

__all__ = ["Place", "WaitingTurn", "WaitingTurns"]

_MEMORY_TURNS = 20
"""Turns after which an answer's length counts a third in the average."""


class WaitingTurn(NamedTuple):
    """A turn without a token."""

    owner: str
    weight: float
    priority: int
    prompt_tokens: int
    """Over all its sequences."""
    max_tokens: int
    """Most tokens it may generate, over all its sequences."""
    num_sequences: int
    since_s: float
    due_s: float
    """When its answer is to begin."""

    @property
    def order(self) -> tuple[int, float]:
        """The lesser goes first among those of its key."""
        return self.priority, self.due_s


class Place(NamedTuple):
    """Where a turn stands among those of its key, the first being 1, and its expected wait."""

    place: int
    wait_s: float | None
    """None: nothing was measured yet."""


class WaitingTurns:
    """The waiting turns of this server. ``clock`` gives monotonic seconds."""

    def __init__(
        self,
        stats: Callable[[], EngineStats],
        pace: Pace,
        *,
        max_waiting: int,
        max_wait_s: float,
    ) -> None:
        self._stats = stats
        self._pace = pace
        self._max_waiting = max_waiting
        self._max_wait_s = max_wait_s
        self._turns: dict[str, WaitingTurn] = {}
        self._answer_tokens = 0.0

    def __len__(self) -> int:
        return len(self._turns)

    def measure(self) -> None:
        """Read how far the engine has come; to be called every second or so."""
        self._pace.update(self._stats())

    def items(self) -> list[tuple[str, WaitingTurn]]:
        """Return the waiting turns by id, in order of arrival."""
        return list(self._turns.items())

    def check(self, turn: WaitingTurn, deadline_s: float | None = None) -> None:
        """Refuse a turn that would wait too long. Raises ApiError 429.

        ``deadline_s`` is how long its client wants to wait.
        """
        mine = sum(other.owner == turn.owner for other in self._turns.values())
        ahead = [other for other in self._turns.values() if other.order <= turn.order]
        wait_s = self._wait_s(turn, ahead)
        total = len(self._turns)
        # Whoever has less than its share of the queue may still come in, up to a second queue.
        full = total >= self._max_waiting and mine >= self._max_waiting * self._share(turn)
        if full or total >= 2 * self._max_waiting:
            raise _refused(f"{total} requests are waiting already", "queue_full", wait_s or 1.0)
        if wait_s is None:
            return
        if deadline_s is not None and wait_s > deadline_s:
            message = f"the answer cannot begin within {deadline_s:g} s"
            raise _refused(message, "deadline_unreachable", wait_s - deadline_s)
        if wait_s > self._max_wait_s:
            message = f"the request would wait for about {wait_s:.0f} s"
            raise _refused(message, "queue_too_slow", wait_s - self._max_wait_s)

    def enter(self, turn_id: str, turn: WaitingTurn) -> None:
        """Let a turn wait."""
        self._turns[turn_id] = turn

    def leave(self, turn_id: str) -> WaitingTurn | None:
        """The turn has its first token, or has ended; None if it did not wait."""
        return self._turns.pop(turn_id, None)

    def answered(self, num_tokens: int) -> None:
        """Learn how long answers are, from one that ended."""
        if num_tokens:
            step = 1 / _MEMORY_TURNS if self._answer_tokens else 1.0
            self._answer_tokens += (num_tokens - self._answer_tokens) * step

    def place(self, turn_id: str) -> Place:
        """Return where a waiting turn stands."""
        turn = self._turns[turn_id]
        ahead = []
        came_before = True
        for other_id, other in self._turns.items():
            if other_id == turn_id:
                came_before = False
            elif other.order < turn.order or (came_before and other.order == turn.order):
                ahead.append(other)
        mine = sum(other.owner == turn.owner for other in ahead)
        return Place(mine + 1, self._wait_s(turn, ahead))

    def _share(self, turn: WaitingTurn) -> float:
        """The part of the engine that is due to a turn's key among those that wait."""
        weights = {other.owner: other.weight for other in self._turns.values()}
        weights[turn.owner] = turn.weight
        return turn.weight / sum(weights.values())

    def _wait_s(self, turn: WaitingTurn, ahead: list[WaitingTurn]) -> float | None:
        """Seconds until the turn's first token if the key's work in ``ahead`` comes before it."""
        tokens_per_s = self._pace.tokens_per_s
        if tokens_per_s is None:
            return None
        # As long as there are free seats, only prompts stand before a first token.
        seated = not self._stats().waiting
        work = float(turn.prompt_tokens)
        for other in ahead:
            if other.owner == turn.owner or other.priority < turn.priority:
                work += other.prompt_tokens
                if not seated:
                    expected = other.num_sequences * (self._answer_tokens or other.max_tokens)
                    work += min(other.max_tokens, expected)
        return work / (tokens_per_s * self._share(turn))


def _refused(reason: str, code: str, retry_after_s: float) -> ApiError:
    wait_s = max(1, math.ceil(retry_after_s))
    return ApiError(
        429,
        f"The server is busy: {reason}; try again in {wait_s} s.",
        kind="rate_limit_error",
        code=code,
        retry_after_s=wait_s,
    )
