"""All journals of a process: the shared writer, and following any turn's log."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from redis.exceptions import RedisError, ResponseError, WatchError

from server.background import end
from server.journal import Entry, Failure, Journal, JournalState, Kept
from server.replicas import HEARTBEAT_S, OPEN_KEEP_S, Replicas
from server.store import Store, StoreError, reaching
from server.stored_log import RETRY_DELAYS_S, StoredLogs, is_terminal, stream_id
from server.write_count import WriteCount

__all__ = ["OPEN_KEEP_S", "JournalNotFound", "Journals"]

log = logging.getLogger("millrace.journal")

MAX_BROKEN_OFF = 10_000
PIPELINE_COMMANDS = 256
"""Of one round trip: its commands are packed, and its replies read, in one go of the event loop."""


ENDED_KEEP_S = 3.0
"""How long an ended log stays in memory: longer than a Redis replica lags behind its master."""
MAX_ENDED = 1024


class JournalNotFound(Exception):
    """There is no log of this turn: it never was, was deleted, or is past its retention."""


class Journals:
    """Opens journals, writes them, and follows any turn's log, wherever it runs or ran.

    ``patience_s`` is how long events may wait for a store that does not answer before their turns
    fail, and readers before their streams end.
    """

    def __init__(self, store: Store, *, patience_s: float = 10.0) -> None:
        self._store = store
        self._patience_s = patience_s
        self.replicas = Replicas(store)
        self.stored = StoredLogs(store, self.replicas, patience_s=patience_s)
        self._live: dict[str, Journal] = {}
        self._dirty: dict[str, Journal] = {}
        self._ended: dict[str, tuple[float, Journal]] = {}
        """Logs that ended lately, by when: the store may yet lose what it confirmed last."""
        self._unverified = False
        """The store was away: it may have come back with less than it had confirmed."""
        self._lost = False
        """The store has lost writes, and not all of them are written again."""
        self._writes = WriteCount(store, self.replicas.id)
        self.broken_off: set[str] = set()
        """Turns that ended here with a failure that the store did not take."""
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def replica_id(self) -> str:
        """Name of this process in the store."""
        return self.replicas.id

    async def start(self) -> None:
        """Begin to write and to tell the other replicas that this one lives."""
        await self.replicas.beat()
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
        await end(*tasks)
        await self.leave()

    async def leave(self) -> None:
        """Tell the other replicas that this one ends; what it has not ended is theirs from now."""
        with contextlib.suppress(RedisError, OSError):
            await self.replicas.leave()

    def open(
        self,
        turn_id: str,
        *,
        keep_s: int,
        failure: Failure,
        kept: Kept | None = None,
        generation: int = 0,
        log: Sequence[Entry] = (),
    ) -> Journal:
        """Open a turn's journal; it is in memory until ``release``.

        ``log`` is what it begins with where the turn is taken over, in its new ``generation``.
        """
        if turn_id in self._live:
            raise AssertionError(f"the journal of {turn_id} is open already")
        journal = Journal(
            turn_id,
            keep_s,
            failure,
            self._mark,
            elsewhere=lambda after: self.stored.read(turn_id, after),
            kept=kept,
            generation=generation,
            log=log,
        )
        self._live[turn_id] = journal
        return journal

    def live(self, turn_id: str) -> Journal | None:
        """Return the journal of a turn that runs here."""
        return self._live.get(turn_id)

    def release(self, journal: Journal) -> None:
        """Forget the memory copy of an ended turn's log, soon; followers that hold it read on."""
        self._live.pop(journal.turn_id, None)
        if journal.state is JournalState.SEALED and not journal.broken:
            self._ended[journal.turn_id] = (time.monotonic(), journal)
            if len(self._ended) > MAX_ENDED:
                del self._ended[next(iter(self._ended))]

    def holds(self, turn_id: str) -> bool:
        """Return whether a turn's log is in memory: it runs here, or has just ended here."""
        return self._held(turn_id) is not None

    def _held(self, turn_id: str) -> Journal | None:
        if turn_id in self._live:
            return self._live[turn_id]
        return self._ended[turn_id][1] if turn_id in self._ended else None

    @property
    def num_live(self) -> int:
        """Journals in memory."""
        return len(self._live)

    async def follow(self, turn_id: str, after: int | None = None) -> AsyncIterator[list[Entry]]:
        """Return the batches of a turn's log after sequence number ``after``.

        Raises JournalNotFound, StoreError.
        """
        journal = self._held(turn_id)
        if journal is not None:
            return journal.follow(after)
        if await self.stored.last(turn_id) is None:
            self.replicas.check_doubt()
            raise JournalNotFound(f"there is no event log of {turn_id}")
        return self.stored.read(turn_id, -1 if after is None else after)

    async def view(self, turn_id: str) -> bytes | None:
        """Return what is needed to show a turn; None if there is none. Raises StoreError."""
        journal = self._held(turn_id)
        if journal is not None and journal.kept is not None:
            return journal.kept.view
        with reaching():
            data: Any = await self._store.redis.get(self.stored.view_key(turn_id))
        if data is None:
            self.replicas.check_doubt()
            return None
        return bytes(data)

    async def settle(self, turn_id: str) -> Entry | None:
        """Return the terminal event of a turn, None while it runs or when nothing is known.

        A turn whose replica died without leaving its work is ended here, with ``response.failed``.
        """
        last = await self.stored.last(turn_id)
        if last is None or self.holds(turn_id):
            return last if last and is_terminal(last) else None
        try:
            if not is_terminal(last) and await self.stored.abandoned(turn_id):
                await self.stored.end_abandoned(turn_id, last.event.sequence_number)
                last = await self.stored.last(turn_id)
        except (RedisError, OSError) as error:
            raise StoreError(f"the store does not answer: {error}") from error
        return last if last and is_terminal(last) else None

    async def delete(self, turn_id: str) -> None:
        """Delete a turn's log and what is stored beside it."""
        stored = self.stored
        self._ended.pop(turn_id, None)
        try:
            await self._store.redis.delete(
                stored.key(turn_id), stored.view_key(turn_id), stored.work_key(turn_id)
            )
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
                self.replicas.doubt()
                self._unverified = True
                failing_since = failing_since or loop.time()
                if loop.time() - failing_since > self._patience_s:
                    log.error("the store takes no events (%s); their turns fail", error)
                    for journal in (dirty | self._dirty).values():
                        self._break_off(
                            journal, "store_unavailable", "The event store does not answer."
                        )
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
        if self._unverified:
            await self._verify_all()
        commands = 0
        group: list[tuple[Journal, int, list[Entry]]] = []
        for journal in journals:
            entries = journal.unwritten()
            if entries:
                group.append((journal, journal.num_written, entries))
                commands += len(entries)
            if commands >= PIPELINE_COMMANDS:
                await self._write_group(group)
                group, commands = [], 0
        if group:
            await self._write_group(group)

    async def _write_group(self, group: Sequence[tuple[Journal, int, list[Entry]]]) -> None:
        # All or nothing: whoever reads or takes over a log never finds half of what one step said.
        pipe = self._store.redis.pipeline(transaction=True)
        pipe.get(self._store.key("epoch"))
        self._writes.queue(pipe)
        num_replies = []
        for journal, start, entries in group:
            before = len(pipe)
            self._queue(pipe, journal, start, entries)
            num_replies.append(len(pipe) - before)
        replies = iter(await pipe.execute(raise_on_error=False))
        epoch, count = next(replies), next(replies)
        for reply in (epoch, count):
            if isinstance(reply, Exception):
                raise reply
        if epoch != self._store.epoch or not self._writes.settle(count):
            await self._recover()
            return
        for (journal, start, entries), count in zip(group, num_replies, strict=True):
            await self._settle_write(journal, start, entries, itertools.islice(replies, count))

    def _queue(self, pipe: Any, journal: Journal, start: int, entries: Sequence[Entry]) -> None:
        turn_id, stored = journal.turn_id, self.stored
        key = stored.key(turn_id)
        if start == 0:
            self._queue_beginning(pipe, journal)
        for number, entry in enumerate(entries, start=start):
            fields: dict[str, str | bytes] = {"d": entry.data}
            if number == 0:
                fields["r"] = self.replica_id
            if entry.notes is not None and journal.kept is not None:
                fields["n"] = entry.notes
            # Where the log is gone, nothing is put behind the gap: it is written again as a whole.
            place = stream_id(journal.generation, number)
            pipe.xadd(key, fields, id=place, nomkstream=start > 0)
        if start == 0:
            pipe.expire(key, OPEN_KEEP_S)
        if is_terminal(entries[-1]):
            pipe.expire(key, journal.keep_s)
            if journal.kept is not None:
                pipe.expire(stored.view_key(turn_id), journal.keep_s)
                pipe.delete(stored.work_key(turn_id))
                pipe.srem(self.replicas.turns_key(self.replica_id), turn_id)

    def _queue_beginning(self, pipe: Any, journal: Journal) -> None:
        turn_id, stored = journal.turn_id, self.stored
        if journal.generation:
            # A log that was lost after a take-over: its mark comes again with it.
            place = f"{journal.generation}-0"
            pipe.xadd(stored.key(turn_id), {"r": self.replica_id}, id=place)
        if journal.kept is not None:
            pipe.set(stored.view_key(turn_id), journal.kept.view, ex=OPEN_KEEP_S)
            pipe.set(stored.work_key(turn_id), journal.kept.work, ex=OPEN_KEEP_S)
            turns_key = self.replicas.turns_key(self.replica_id)
            pipe.sadd(turns_key, turn_id)
            pipe.expire(turns_key, OPEN_KEEP_S)

    async def _settle_write(
        self, journal: Journal, start: int, entries: Sequence[Entry], replies: Any
    ) -> None:
        refused = False
        for reply in replies:
            if isinstance(reply, ResponseError) and "equal or smaller" in str(reply):
                refused = True
            elif isinstance(reply, Exception):
                raise reply
            elif reply is None:
                log.error("the store lost the log of %s; writing it again", journal.turn_id)
                journal.rewind(0)
                return
        if refused and not await self._is_ours(journal, start, entries):
            return
        journal.confirm(start + len(entries))

    async def _is_ours(self, journal: Journal, start: int, entries: Sequence[Entry]) -> bool:
        """Tell a write that we repeated from a log that another replica has gone on with."""
        if await self._moved(journal):
            return False
        stored = await self.stored.entries(journal.turn_id, journal.generation, start)
        if [entry.data for entry in stored] == [entry.data for entry in entries]:
            return True
        if stored and is_terminal(stored[-1]):
            log.error("%s was ended by another replica", journal.turn_id)
            journal.replace_tail(stored)
        else:
            log.error("the stored log of %s is not what was written", journal.turn_id)
            self._break_off(
                journal, "store_conflict", "The stored event log was changed by others."
            )
        return False

    def _break_off(self, journal: Journal, code: str, message: str) -> None:
        if len(self.broken_off) >= MAX_BROKEN_OFF:
            self.broken_off.pop()
        self.broken_off.add(journal.turn_id)
        journal.break_off(code, message)

    async def _moved(self, journal: Journal) -> bool:
        """Stop a turn that another replica has taken over; return whether it has."""
        tail = await self.stored.tail(journal.turn_id)
        if tail is None or tail.generation <= journal.generation:
            return False
        if journal.turn_id not in self._live:
            return True
        log.warning("%s runs on another replica now", journal.turn_id)
        journal.move()
        return True

    async def _verify_all(self) -> None:
        """Compare the live logs with what the store has kept of them, after it was away.

        A store that was restarted or failed over may have lost what it had confirmed last; and
        while this process did not reach it, others may have taken turns over.
        """
        self._unverified = False
        epoch = await self._store.redis.get(self._store.key("epoch"))
        if epoch != self._store.epoch or self._lost or await self._writes.lost():
            await self._recover()
            return
        for journal in list(self._live.values()):
            if journal.broken or not journal.num_written:
                continue
            tail = await self.stored.tail(journal.turn_id)
            if tail is not None and tail.generation > journal.generation:
                log.warning("%s runs on another replica now", journal.turn_id)
                journal.move()
            else:
                journal.rewind(0 if tail is None else tail.num_events)

    async def _recover(self) -> None:
        """Write what is in memory again from its beginning: the store lost some of it, or all.

        Behind what it lost there may be what was written since: that log has a gap.
        """
        self._lost = True
        await self._store.renew_epoch()
        num_writes = await self._writes.stored()
        journals = [journal for _, journal in self._ended.values()]
        journals = [one for one in journals if one.turn_id not in self._live]
        log.error(
            "the store lost some of its history; writing %d turns again",
            len(self._live) + len(journals),
        )
        await self.replicas.beat()
        for journal in [*self._live.values(), *journals]:
            while not await self._rewrite(journal):
                pass
        self._writes.count_from(num_writes)
        self._lost = False

    async def _rewrite(self, journal: Journal) -> bool:
        """Put a whole log in the place of what the store has of it; False: it changed meanwhile."""
        entries = journal.entries()
        if journal.broken or not entries:
            return True
        async with self._store.redis.pipeline(transaction=True) as pipe:
            # Another replica may claim the turn just now: not a row of its own may be deleted.
            await pipe.watch(self.stored.key(journal.turn_id))
            if await self._moved(journal):
                return True
            pipe.multi()  # type: ignore[no-untyped-call]
            pipe.delete(self.stored.key(journal.turn_id))
            self._queue(pipe, journal, 0, entries)
            try:
                await pipe.execute()
            except WatchError:
                return False
        journal.confirm(len(entries))
        await journal.on_rewritten()
        return True

    # Living and dead replicas

    async def _beat_forever(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            try:
                if not await self.replicas.beat() and self._live:
                    log.warning("this server was silent for too long; looking after its turns")
                    await self._verify_all()
                if await self._writes.lost():
                    self._unverified = True
                    self._wake.set()
                else:
                    self._forget_ended()
            except (RedisError, OSError) as error:
                self.replicas.doubt()
                log.warning("no heartbeat: the store does not answer (%s)", error)

    def _forget_ended(self) -> None:
        old_s = time.monotonic() - ENDED_KEEP_S
        for turn_id in [one for one, (at_s, _) in self._ended.items() if at_s < old_s]:
            del self._ended[turn_id]

    async def lives(self, replica_id: str) -> bool:
        """Return whether a replica has shown a sign of life lately."""
        return await self.replicas.lives(replica_id)
