"""Reading turns' logs from the store, whoever writes them; gaps in them become discontinuities."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from enum import Enum
from typing import Any, NamedTuple, TypeVar

from redis.exceptions import RedisError, ResponseError

from server.events import (
    TERMINAL_EVENTS,
    Discontinuity,
    ResponseCreated,
    ResponseFailed,
    decode_event,
    encode_event,
)
from server.journal import BATCH_EVENTS, Entry
from server.replicas import Replicas
from server.response_object import failed_event
from server.store import Store, StoreError

__all__ = ["RETRY_DELAYS_S", "LogTail", "StoredLogs", "is_terminal", "stream_id"]

READ_BLOCK_MS = 2000
LOST_LOG_WAIT_S = 0.25
LOST_LOG_PATIENCE_S = 5.0
RETRY_DELAYS_S = (0.01, 0.05, 0.1, 0.25, 0.5)

_T = TypeVar("_T")


class LogTail(NamedTuple):
    """Where a stored log ends."""

    generation: int
    entry: Entry | None
    """The last event; None where there is only the mark of a take-over."""

    @property
    def num_events(self) -> int:
        """How many events the log has, were none of them lost."""
        return 0 if self.entry is None else self.entry.event.sequence_number + 1


class _Row(NamedTuple):
    id: str
    entry: Entry | None
    replica: str | None

    @property
    def generation(self) -> int:
        return int(self.id.partition("-")[0])


class _LogState(Enum):
    GROWS = "grows"
    OVER = "over"
    GONE = "gone"


class StoredLogs:
    """Reads logs. ``patience_s`` is how long a reader waits for a store that does not answer."""

    def __init__(self, store: Store, replicas: Replicas, *, patience_s: float) -> None:
        self._store = store
        self._redis = store.redis
        self._replicas = replicas
        self._patience_s = patience_s

    def key(self, turn_id: str) -> str:
        """Return the key of a log."""
        return self._store.key("journal", turn_id)

    def work_key(self, turn_id: str) -> str:
        """Return the key of what another replica needs to go on with a turn."""
        return self._store.key("turn", turn_id, "work")

    def view_key(self, turn_id: str) -> str:
        """Return the key of what is needed to show a turn in its dialect."""
        return self._store.key("turn", turn_id)

    async def tail(self, turn_id: str) -> LogTail | None:
        """Return where a log ends; None if there is none."""
        rows = await self._last_rows(turn_id, 2)
        if not rows:
            return None
        entry = next((row.entry for row in rows if row.entry is not None), None)
        return LogTail(rows[0].generation, entry)

    async def last(self, turn_id: str) -> Entry | None:
        """Return the last event of a log. Raises StoreError."""
        try:
            tail = await self.tail(turn_id)
        except (RedisError, OSError) as error:
            raise _unreachable(error) from error
        return tail.entry if tail else None

    async def entries(self, turn_id: str, generation: int = 0, first: int = 0) -> list[Entry]:
        """Return the stored events from sequence number ``first`` of a generation on."""
        rows = await self._rows(turn_id, stream_id(generation, first - 1))
        return [row.entry for row in rows if row.entry is not None]

    async def owner(self, turn_id: str) -> str:
        """Return the replica that began the turn or last took it over; "" if that is unknown."""
        rows = await self._last_rows(turn_id, 1)
        generation = rows[0].generation if rows else 0
        first = f"{generation}-0" if generation else stream_id(0, 0)
        found: Any = await self._redis.xrange(self.key(turn_id), min=first, count=1)
        return (_row(found[0]).replica or "") if found else ""

    async def abandoned(self, turn_id: str) -> bool:
        """Return whether nobody runs the turn or will: its replica is dead and left no work."""
        if await self._redis.exists(self.work_key(turn_id)):
            return False
        return not await self._replicas.lives(await self.owner(turn_id))

    async def end_abandoned(
        self,
        turn_id: str,
        last_number: int,
        *,
        response: dict[str, Any] | None = None,
        code: str = "server_error",
        message: str = "The server that ran this turn went away.",
    ) -> None:
        """Append the terminal event that a dead replica owes; only one reader succeeds."""
        tail = await self.tail(turn_id)
        if response is None:
            first = await self._rows(turn_id, "0-0", 1)
            event = first[0].entry.event if first and first[0].entry else None
            response = event.response if isinstance(event, ResponseCreated) else {"id": turn_id}
        failed = failed_event(response, code, message)
        number = last_number + 1
        data = encode_event(ResponseFailed(sequence_number=number, response=failed.response))
        place = stream_id(tail.generation if tail else 0, number)
        with contextlib.suppress(ResponseError):
            await self._redis.xadd(self.key(turn_id), {"d": data}, id=place)

    async def read(self, turn_id: str, after: int) -> AsyncIterator[list[Entry]]:
        """Yield a log's events after sequence number ``after`` (-1: all), to the terminal one.

        Raises StoreError when the store is away for longer than the reader's patience.
        """
        cursor = stream_id(0, after)
        missed = 0
        while True:
            rows = await self._patiently(lambda: self._rows(turn_id, cursor, BATCH_EVENTS))  # noqa: B023
            if rows:
                cursor = rows[-1].id
                entries = [row.entry for row in rows if row.entry is not None]
                # What comes first may be of a generation whose beginning the reader has seen.
                new = [one for one in entries if one.event.sequence_number > after]
                missed = 0
                if not new:
                    continue
                batch = _checked(new, after)
                after = batch[-1].event.sequence_number
                yield batch
                if is_terminal(batch[-1]):
                    return
                continue
            state = await self._patiently(lambda: self._state(turn_id, after))  # noqa: B023
            if state is _LogState.OVER:
                return
            if state is _LogState.GROWS:
                missed = 0
                await self._patiently(lambda: self._wait(turn_id, cursor))  # noqa: B023
                continue
            # The replica that runs the turn writes a lost log again; it gets time to do so.
            missed += 1
            cursor = stream_id(0, after)
            await asyncio.sleep(LOST_LOG_WAIT_S)
            if missed * LOST_LOG_WAIT_S > LOST_LOG_PATIENCE_S:
                yield _lost(turn_id, after)
                return

    async def _patiently(self, work: Callable[[], Awaitable[_T]]) -> _T:
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._patience_s
        failures = 0
        while True:
            try:
                return await work()
            except (RedisError, OSError) as error:
                if loop.time() > give_up_s:
                    raise _unreachable(error) from error
            await asyncio.sleep(RETRY_DELAYS_S[min(failures, len(RETRY_DELAYS_S) - 1)])
            failures += 1

    async def _wait(self, turn_id: str, cursor: str) -> None:
        await self._redis.xread({self.key(turn_id): cursor}, 1, READ_BLOCK_MS)

    async def _state(self, turn_id: str, after: int) -> _LogState:
        """Return what may come after ``after``; ends the turn of a dead replica without heirs."""
        last = await self.last(turn_id)
        if last is None:
            return _LogState.GONE
        number = last.event.sequence_number
        if is_terminal(last):
            return _LogState.OVER if number <= after else _LogState.GONE
        if await self.abandoned(turn_id):
            # A reader may have seen more than the store still has: go on after that.
            await self.end_abandoned(turn_id, max(number, after))
        return _LogState.GROWS

    async def _last_rows(self, turn_id: str, count: int) -> list[_Row]:
        rows: Any = await self._redis.xrevrange(self.key(turn_id), count=count)
        return [_row(row) for row in rows]

    async def _rows(self, turn_id: str, after_id: str, count: int | None = None) -> list[_Row]:
        """Return up to ``count`` rows behind the row ``after_id``."""
        rows: Any = await self._redis.xrange(self.key(turn_id), min=f"({after_id}", count=count)
        return [_row(row) for row in rows]


def stream_id(generation: int, sequence_number: int) -> str:
    """Return the place of an event in the store; -1 is before the first."""
    return f"{generation}-{sequence_number + 1}"


def is_terminal(entry: Entry) -> bool:
    """Return whether an event ends its turn."""
    return isinstance(entry.event, TERMINAL_EVENTS)


def _row(row: tuple[bytes, dict[bytes, bytes]]) -> _Row:
    place, fields = row
    data = fields.get(b"d")
    entry = Entry(decode_event(data), data, fields.get(b"n")) if data is not None else None
    replica = fields.get(b"r")
    return _Row(place.decode(), entry, None if replica is None else replica.decode())


def _unreachable(error: Exception) -> StoreError:
    return StoreError(f"the store does not answer: {error}")


def _lost(turn_id: str, after: int) -> list[Entry]:
    """Return the end of a log that is gone: a discontinuity and a failure, stored nowhere."""
    gap = Discontinuity(sequence_number=after + 1, first_lost=after + 1, last_lost=after + 1)
    failed = failed_event({"id": turn_id}, "history_lost", "The event store lost this turn.")
    failed = ResponseFailed(sequence_number=after + 2, response=failed.response)
    return [Entry(event, encode_event(event)) for event in (gap, failed)]


def _checked(entries: list[Entry], after: int) -> list[Entry]:
    """Put a discontinuity where events are missing."""
    checked: list[Entry] = []
    for entry in entries:
        number = entry.event.sequence_number
        if number != after + 1:
            gap = Discontinuity(
                sequence_number=number - 1, first_lost=after + 1, last_lost=number - 1
            )
            checked.append(Entry(gap, encode_event(gap)))
        checked.append(entry)
        after = number
    return checked
