"""All journals of a process: the shared writer, and reading the logs of other turns from Redis."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
from collections.abc import AsyncIterator, Sequence
from enum import Enum
from typing import Any

from redis.exceptions import RedisError, ResponseError

from server.events import (
    TERMINAL_EVENTS,
    Discontinuity,
    ResponseCreated,
    ResponseFailed,
    decode_event,
    encode_event,
)
from server.journal import BATCH_EVENTS, Entry, Failure, Journal
from server.response_object import failed_event
from server.store import Store, StoreError

__all__ = ["JournalNotFound", "Journals"]

log = logging.getLogger("millrace.journal")

OPEN_KEEP_S = 24 * 3600
"""Life of a log whose turn has not ended: longer than any turn."""
HEARTBEAT_S = 4.0
REPLICA_TTL_S = 15
"""A replica that was silent for so long is taken for dead, and its turns for failed."""
READ_BLOCK_MS = 2000
LOST_LOG_WAIT_S = 0.25
LOST_LOG_PATIENCE_S = 5.0
RETRY_DELAYS_S = (0.01, 0.05, 0.1, 0.25, 0.5)
PIPELINE_COMMANDS = 256
"""Of one round trip: its commands are packed, and its replies read, in one go of the event loop."""


class JournalNotFound(Exception):
    """There is no log of this turn: it never was, was deleted, or is past its retention."""


_Row = tuple[bytes, dict[bytes, bytes]]


class _LogState(Enum):
    GROWS = "grows"
    OVER = "over"
    GONE = "gone"


class Journals:
    """Opens journals, writes them, and follows any turn's log, wherever it runs or ran.

    ``patience_s`` is how long events may wait for a store that does not answer before their turns
    fail.
    """

    def __init__(self, store: Store, *, patience_s: float = 10.0) -> None:
        self._store = store
        self._patience_s = patience_s
        self._live: dict[str, Journal] = {}
        self._dirty: dict[str, Journal] = {}
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self.replica_id = secrets.token_hex(8)
        """Names this process in the store."""

    async def start(self) -> None:
        """Begin to write and to tell the other replicas that this one lives."""
        await self._beat()
        self._tasks = [
            asyncio.create_task(self._write_forever(), name="journal-writer"),
            asyncio.create_task(self._beat_forever(), name="journal-heartbeat"),
        ]

    async def close(self) -> None:
        """Write what is pending and stop. Idempotent."""
        if not self._tasks:
            return
        for journal in list(self._live.values()):
            await journal.written()
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(RedisError, OSError):
            await self._store.redis.delete(self._replica_key(self.replica_id))

    def open(self, turn_id: str, *, keep_s: int, failure: Failure) -> Journal:
        """Open a new turn's journal; it is in memory until ``release``."""
        if turn_id in self._live:
            raise AssertionError(f"the journal of {turn_id} is open already")
        journal = Journal(turn_id, keep_s, failure, self._mark)
        self._live[turn_id] = journal
        return journal

    def live(self, turn_id: str) -> Journal | None:
        """Return the journal of a turn that runs here."""
        return self._live.get(turn_id)

    def release(self, journal: Journal) -> None:
        """Forget the memory copy of an ended turn's log; followers that hold it read on."""
        self._live.pop(journal.turn_id, None)

    @property
    def num_live(self) -> int:
        """Journals in memory."""
        return len(self._live)

    async def follow(self, turn_id: str, after: int | None = None) -> AsyncIterator[list[Entry]]:
        """Return the batches of a turn's log after sequence number ``after``.

        Raises JournalNotFound, StoreError.
        """
        journal = self._live.get(turn_id)
        if journal is not None:
            return journal.follow(after)
        last = await self._last(turn_id)
        if last is None:
            raise JournalNotFound(f"there is no event log of {turn_id}")
        return self._read(turn_id, -1 if after is None else after)

    async def settle(self, turn_id: str) -> Entry | None:
        """Return the terminal event of a turn, None while it runs or when nothing is known.

        A turn whose replica died is ended here, with ``response.failed``.
        """
        last = await self._last(turn_id)
        if last is None or turn_id in self._live:
            return None
        if not _is_terminal(last) and await self._orphaned(turn_id):
            await self._end_orphan(turn_id, last.event.sequence_number)
            last = await self._last(turn_id)
        return last if last and _is_terminal(last) else None

    async def delete(self, turn_id: str) -> None:
        """Delete a turn's log."""
        try:
            await self._store.redis.delete(self._key(turn_id))
        except (RedisError, OSError) as error:
            raise StoreError(f"the store does not answer: {error}") from error

    # Writing

    def _mark(self, journal: Journal) -> None:
        self._dirty[journal.turn_id] = journal
        self._wake.set()

    async def _write_forever(self) -> None:
        loop = asyncio.get_running_loop()
        failing_since: float | None = None
        failures = 0
        while True:
            await self._wake.wait()
            self._wake.clear()
            dirty, self._dirty = self._dirty, {}
            try:
                await self._write(list(dirty.values()))
            except (RedisError, OSError, StoreError) as error:
                failing_since = failing_since or loop.time()
                if loop.time() - failing_since > self._patience_s:
                    log.error("the store takes no events (%s); their turns fail", error)
                    for journal in (dirty | self._dirty).values():
                        journal.break_off("store_unavailable", "The event store does not answer.")
                    self._dirty.clear()
                else:
                    self._dirty = dirty | self._dirty
                    self._wake.set()
                await asyncio.sleep(RETRY_DELAYS_S[min(failures, len(RETRY_DELAYS_S) - 1)])
                failures += 1
            else:
                failing_since, failures = None, 0

    async def _write(self, journals: Sequence[Journal]) -> None:
        """Append everything that is pending in one round trip, then let followers see it."""
        commands = 0
        group: list[tuple[Journal, int, list[Entry]]] = []
        for journal in journals:
            entries = journal.unwritten()
            if entries:
                group.append((journal, journal.num_visible, entries))
                commands += len(entries)
            if commands >= PIPELINE_COMMANDS:
                await self._write_group(group)
                group, commands = [], 0
        if group:
            await self._write_group(group)

    async def _write_group(self, group: Sequence[tuple[Journal, int, list[Entry]]]) -> None:
        pipe = self._store.redis.pipeline(transaction=False)
        pipe.get(self._store.key("epoch"))
        num_replies = []
        for journal, start, entries in group:
            before = len(pipe)
            self._queue(pipe, journal, start, entries)
            num_replies.append(len(pipe) - before)
        replies = iter(await pipe.execute(raise_on_error=False))
        epoch = next(replies)
        if isinstance(epoch, Exception):
            raise epoch
        if epoch != self._store.epoch:
            await self._recover()
            return
        for (journal, start, entries), count in zip(group, num_replies, strict=True):
            await self._settle_write(journal, start, entries, itertools.islice(replies, count))

    def _queue(self, pipe: Any, journal: Journal, start: int, entries: Sequence[Entry]) -> None:
        key = self._key(journal.turn_id)
        for number, entry in enumerate(entries, start=start):
            fields: dict[str, str | bytes] = {"d": entry.data}
            if number == 0:
                fields["r"] = self.replica_id
            pipe.xadd(key, fields, id=_stream_id(number))
        if start == 0:
            pipe.expire(key, OPEN_KEEP_S)
        if _is_terminal(entries[-1]):
            pipe.expire(key, journal.keep_s)

    async def _settle_write(
        self, journal: Journal, start: int, entries: Sequence[Entry], replies: Any
    ) -> None:
        refused = False
        for reply in replies:
            if isinstance(reply, ResponseError) and "equal or smaller" in str(reply):
                refused = True
            elif isinstance(reply, Exception):
                raise reply
        if refused and not await self._is_ours(journal, start, entries):
            return
        journal.confirm(start + len(entries))

    async def _is_ours(self, journal: Journal, start: int, entries: Sequence[Entry]) -> bool:
        """Tell a write that we repeated from a log that another replica has ended."""
        rows = await self._rows(journal.turn_id, start)
        stored = [_row_entry(row) for row in rows]
        ours = [entry.data for entry in entries]
        if [entry.data for entry in stored] == ours:
            return True
        if stored and _is_terminal(stored[-1]):
            log.error("%s was ended by another replica", journal.turn_id)
            journal.replace_tail(stored)
        else:
            log.error("the stored log of %s is not what was written", journal.turn_id)
            journal.break_off("store_conflict", "The stored event log was changed by others.")
        return False

    async def _recover(self) -> None:
        """Write all live logs again from their beginning: the store lost its history."""
        await self._store.renew_epoch()
        log.error("the store lost its history; writing %d live turns again", len(self._live))
        await self._beat()
        for journal in list(self._live.values()):
            entries = journal.entries()
            if journal.broken or not entries:
                continue
            pipe = self._store.redis.pipeline(transaction=True)
            # What the failed write appended behind the gap.
            pipe.delete(self._key(journal.turn_id))
            self._queue(pipe, journal, 0, entries)
            await pipe.execute()
            journal.confirm(len(entries))

    # Living and dead replicas

    async def _beat(self) -> None:
        await self._store.redis.set(self._replica_key(self.replica_id), b"1", ex=REPLICA_TTL_S)

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                await self._beat()
            except (RedisError, OSError) as error:
                log.warning("no heartbeat: the store does not answer (%s)", error)

    async def _orphaned(self, turn_id: str) -> bool:
        rows = await self._rows(turn_id, 0, 1)
        replica = rows[0][1].get(b"r", b"").decode() if rows else ""
        return not await self.lives(replica)

    async def lives(self, replica_id: str) -> bool:
        """Return whether a replica has shown a sign of life lately."""
        return bool(await self._store.redis.exists(self._replica_key(replica_id)))

    async def _end_orphan(self, turn_id: str, last_number: int) -> None:
        """Append the terminal event that a dead replica owes; only one reader succeeds."""
        key = self._key(turn_id)
        rows = await self._rows(turn_id, 0, 1)
        first = _row_entry(rows[0]).event if rows else None
        response = first.response if isinstance(first, ResponseCreated) else {"id": turn_id}
        event = failed_event(response, "server_error", "The server that ran this turn went away.")
        number = last_number + 1
        data = encode_event(type(event)(sequence_number=number, response=event.response))
        with contextlib.suppress(ResponseError):
            await self._store.redis.xadd(key, {"d": data}, id=_stream_id(number))

    # Reading

    async def _last(self, turn_id: str) -> Entry | None:
        try:
            rows: Any = await self._store.redis.xrevrange(self._key(turn_id), count=1)
        except (RedisError, OSError) as error:
            raise StoreError(f"the store does not answer: {error}") from error
        return _row_entry(rows[0]) if rows else None

    async def _rows(self, turn_id: str, first: int, count: int | None = None) -> list[_Row]:
        """Return up to ``count`` stored rows from sequence number ``first`` on."""
        rows: Any = await self._store.redis.xrange(
            self._key(turn_id), min=_stream_id(first), count=count
        )
        return list(rows)

    async def _read(self, turn_id: str, after: int) -> AsyncIterator[list[Entry]]:
        """Yield a stored log from ``after`` on; gaps in it become discontinuities."""
        key = self._key(turn_id)
        missed = 0
        while True:
            try:
                rows = await self._rows(turn_id, after + 1, BATCH_EVENTS)
                state = _LogState.GROWS if rows else await self._log_state(turn_id, after)
                if state is _LogState.GROWS and not rows:
                    await self._store.redis.xread({key: _stream_id(after)}, 1, READ_BLOCK_MS)
            except (RedisError, OSError) as error:
                raise StoreError(f"the store does not answer: {error}") from error
            if rows:
                batch = _checked([_row_entry(row) for row in rows], after)
                yield batch
                after = batch[-1].event.sequence_number
            if state is _LogState.OVER or (rows and _is_terminal(batch[-1])):
                return
            missed = missed + 1 if state is _LogState.GONE else 0
            if missed:
                # The replica that runs the turn writes a lost log again; it gets time to do so.
                await asyncio.sleep(LOST_LOG_WAIT_S)
            if missed * LOST_LOG_WAIT_S > LOST_LOG_PATIENCE_S:
                yield _lost(turn_id, after)
                return

    async def _log_state(self, turn_id: str, after: int) -> _LogState:
        """Return what may come after ``after``; ends the turn of a dead replica."""
        last = await self._last(turn_id)
        if last is None:
            return _LogState.GONE
        if _is_terminal(last):
            number = last.event.sequence_number
            return _LogState.OVER if number <= after else _LogState.GROWS
        if await self._orphaned(turn_id):
            # A reader may have seen more than the store still has: go on after that.
            await self._end_orphan(turn_id, max(last.event.sequence_number, after))
        return _LogState.GROWS

    def _key(self, turn_id: str) -> str:
        return self._store.key("journal", turn_id)

    def _replica_key(self, replica_id: str) -> str:
        return self._store.key("replica", replica_id)


def _stream_id(sequence_number: int) -> str:
    # Redis refuses the id 0-0.
    return f"{sequence_number + 1}-0"


def _row_entry(row: _Row) -> Entry:
    data = row[1][b"d"]
    return Entry(decode_event(data), data)


def _is_terminal(entry: Entry) -> bool:
    return isinstance(entry.event, TERMINAL_EVENTS)


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
