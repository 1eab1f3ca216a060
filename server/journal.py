"""The event log of a turn: append-only, in Redis before any client sees it.

An event's sequence number is its place in the log, dense from 0. In Redis the log is a stream whose
entry ids are ``<generation>-<sequence number + 1>``: appending the same event again is refused by
Redis, so a write whose answer got lost can simply be repeated. A turn has a new generation each
time that another replica takes it over; its first entry, ``<generation>-0``, makes Redis refuse
whatever an earlier owner that was only slow still sends. All turns of the process share one writer,
which takes everything that is pending into one pipelined round trip; with continuous batching that
is one a step of the engine.

While a turn runs here, its log is also in memory and followers read that, each at its own pace.
What they may see ends where Redis has confirmed. Other turns are read from Redis.

Beside an event stands what made it (``note``): the engine's deltas, so that another replica can
bring a new ``Turn`` to the same state by letting it see them again. A journal that is given such a
log checks that the same events come, places in the queue apart, and goes on where the log ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from server.events import (
    TERMINAL_EVENTS,
    Event,
    OutputTextDelta,
    ResponseFailed,
    ResponseQueued,
    encode_event,
)

__all__ = [
    "Entry",
    "Journal",
    "JournalBroken",
    "JournalError",
    "JournalLeft",
    "JournalMismatch",
    "JournalMoved",
    "JournalState",
    "Kept",
    "merge_deltas",
]

LAG_EVENTS = 64
"""A follower that is this far behind gets adjacent text deltas merged."""
BATCH_EVENTS = 512
"""Most events a follower takes at once."""


class JournalState(Enum):
    """Life of a journal."""

    OPEN = "open"
    SEALED = "sealed"
    """The terminal event is in it."""


class JournalError(Exception):
    """An event was appended where none may follow."""


class JournalBroken(JournalError):
    """The log was ended from outside: the store is gone, or another replica ended the turn."""


class JournalMoved(JournalBroken):
    """Another replica has taken the turn over; what is left of it here has nothing more to say."""


class JournalLeft(JournalError):
    """The turn goes on at another server, and this one ends: its readers are to go there too."""


class JournalMismatch(JournalError):
    """A turn that is brought to the state its log tells of says something else than the log."""


class Entry(NamedTuple):
    """An event with its JSON, encoded once for the store and every follower."""

    event: Event
    data: bytes
    notes: bytes | None = None
    """What made it, for whoever takes the turn over; None: nothing new since the event before."""


class Kept(NamedTuple):
    """What is stored beside a log: ``view`` as long as the log, ``work`` while the turn runs."""

    view: bytes
    work: bytes


Failure = Callable[[str, str], ResponseFailed]
"""(code, message) to the terminal event that ends this turn with that error."""
Elsewhere = Callable[[int], AsyncIterator[list[Entry]]]
"""Reads on from the store after a sequence number (-1: all), when the turn runs elsewhere."""

_encode_notes = msgspec.msgpack.Encoder().encode


class Journal:
    """The log of one turn of this process."""

    def __init__(
        self,
        turn_id: str,
        keep_s: int,
        failure: Failure,
        on_append: Callable[[Journal], None],
        *,
        elsewhere: Elsewhere,
        kept: Kept | None = None,
        generation: int = 0,
        log: Sequence[Entry] = (),
    ) -> None:
        self.turn_id = turn_id
        self.keep_s = keep_s
        """How long the store keeps the log after its end."""
        self.kept = kept
        self.generation = generation
        self.state = JournalState.OPEN
        self.broken = False
        """Ended from outside; the turn has nothing more to say."""
        self.moved = False
        """Broken because another replica runs the turn."""
        self.left = False
        """Broken because this server ends and the turn goes on elsewhere."""
        self.on_moved: Callable[[], None] = lambda: None
        self.on_rewritten: Callable[[], Awaitable[None]] = _nothing
        """Called when the store lost the log, or may have: what else is stored of the turn may be
        lost too. May raise StoreUnavailable."""
        self._failure = failure
        self._on_append = on_append
        self._elsewhere = elsewhere
        self._log: list[Entry] = list(log)
        self._rehearsed = 0
        """Of the events this journal began with, those that its turn has said again."""
        self._num_given = len(self._log)
        self._pass_over()
        self._num_visible = self._num_written = len(self._log)
        self._notes: list[object] = []
        self._waiters: set[asyncio.Future[None]] = set()

    def note(self, what: object) -> None:
        """Store ``what`` (msgpack-able) beside the next event: it is about to make it."""
        if self._rehearsed == self._num_given:
            self._notes.append(what)

    def append(self, event: Event) -> Entry:
        """Give ``event`` the next sequence number and queue it for the store.

        Raises JournalError after the terminal event, JournalBroken if the log was ended from
        outside, JournalMismatch if the log the journal began with has something else here.
        """
        if self._rehearsed < self._num_given:
            return self._rehearse(event)
        if self.moved or self.left:
            raise JournalMoved(f"{self.turn_id} runs on another replica")
        if self.state is JournalState.SEALED:
            last = type(self._log[-1].event).__name__
            error = JournalBroken if self.broken else JournalError
            raise error(
                f"{self.turn_id} has ended with {last}; {type(event).__name__} cannot follow"
            )
        entry = _entry(event, len(self._log), self._take_notes())
        self._log.append(entry)
        if isinstance(event, TERMINAL_EVENTS):
            self.state = JournalState.SEALED
        self._on_append(self)
        return entry

    def _take_notes(self) -> bytes | None:
        if not self._notes:
            return None
        notes, self._notes = self._notes, []
        return _encode_notes(notes)

    def _rehearse(self, event: Event) -> Entry:
        entry = self._log[self._rehearsed]
        said = _entry(event, self._rehearsed)
        if said.data != entry.data:
            raise JournalMismatch(
                f"event {self._rehearsed} of {self.turn_id} is a {type(entry.event).__name__}, but "
                f"this server makes another {type(event).__name__} of the same tokens"
            )
        self._rehearsed += 1
        self._pass_over()
        return entry

    def _pass_over(self) -> None:
        """Take as said what no turn says again: its places in the queue, which come of the time."""
        while not self.rehearsed and isinstance(self._log[self._rehearsed].event, ResponseQueued):
            self._rehearsed += 1

    @property
    def rehearsed(self) -> bool:
        """Whether all events that the journal began with have been said again."""
        return self._rehearsed == self._num_given

    def give_up_rehearsal(self) -> None:
        """Append after the log as it is, though its turn did not come to say the same."""
        self._rehearsed = self._num_given

    def __len__(self) -> int:
        return len(self._log)

    @property
    def num_visible(self) -> int:
        """How many events the store has confirmed."""
        return self._num_visible

    def entries(self) -> list[Entry]:
        """Return the whole log, confirmed or not."""
        return self._log.copy()

    @property
    def num_written(self) -> int:
        """How many events the store has, as far as is known."""
        return self._num_written

    def unwritten(self) -> list[Entry]:
        """Return what the store has not confirmed."""
        return self._log[self._num_written :]

    def rewind(self, num_written: int) -> None:
        """The store has only the first ``num_written`` events: the rest is to be written again."""
        if num_written < self._num_written:
            self._num_written = num_written
            self._on_append(self)

    def confirm(self, num_written: int) -> None:
        """Let followers see the first ``num_written`` events."""
        self._num_written = num_written
        # What was shown once stays shown while it is written again.
        self._num_visible = max(num_written, self._num_visible)
        self._notify()

    def _notify(self) -> None:
        waiters, self._waiters = self._waiters, set()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def replace_tail(self, entries: list[Entry]) -> None:
        """Take over how another replica ended this turn, instead of what is unwritten."""
        self._log[self._num_visible :] = entries
        self._break(len(self._log))

    def break_off(self, code: str, message: str) -> None:
        """End the log in memory only: the store does not take it.

        What is unwritten was never shown and is dropped.
        """
        if self.moved:
            return
        del self._log[self._num_visible :]
        if self.left:
            self._break(len(self._log))
            return
        if not self._log or not isinstance(self._log[-1].event, TERMINAL_EVENTS):
            self._log.append(_entry(self._failure(code, message), len(self._log)))
        self._break(len(self._log))

    def move(self) -> None:
        """Another replica has the turn: followers read on from the store, the turn stops here."""
        if self.moved:
            return
        del self._log[self._num_visible :]
        self.moved = True
        self._break(len(self._log))
        self.on_moved()

    def leave(self) -> None:
        """This server ends before the turn does: what was appended is still written, no more comes.

        Followers get what is written, then JournalLeft.
        """
        if self.state is JournalState.OPEN:
            self.left = True
            self.state = JournalState.SEALED
            self.broken = True
            self._rehearsed = self._num_given
            self._notify()

    def _break(self, num_visible: int) -> None:
        self.state = JournalState.SEALED
        self.broken = True
        self._rehearsed = self._num_given
        self.confirm(num_visible)

    async def written(self) -> None:
        """Wait until everything appended so far is confirmed."""
        target = len(self._log)
        while self._num_written < min(target, len(self._log)):
            await self._changed()

    async def _changed(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)

    async def follow(self, after: int | None = None) -> AsyncIterator[list[Entry]]:
        """Yield what comes after sequence number ``after`` (None: all), to the terminal event.

        Every entry comes once, in order, several at a time when several are ready. A reader that
        had caught up and then fell behind gets adjacent text deltas merged. Raises JournalLeft.
        """
        position = 0 if after is None else after + 1
        caught_up = False
        while True:
            ready = self._log[position : min(self._num_visible, position + BATCH_EVENTS)]
            if ready:
                position += len(ready)
                late = caught_up and len(ready) >= LAG_EVENTS
                yield merge_deltas(ready) if late else ready
            elif self.moved:
                async for batch in self._elsewhere(position - 1):
                    yield batch
                return
            elif self.state is JournalState.SEALED and self._num_visible >= len(self._log):
                if self.left:
                    raise JournalLeft(f"{self.turn_id} goes on at another server")
                return
            else:
                caught_up = True
                await self._changed()


async def _nothing() -> None:
    pass


def _entry(event: Event, sequence_number: int, notes: bytes | None = None) -> Entry:
    # The event is the journal's from here on; nobody else has a reason to hold it.
    msgspec.structs.force_setattr(event, "sequence_number", sequence_number)
    return Entry(event, encode_event(event), notes)


def merge_deltas(entries: list[Entry]) -> list[Entry]:
    """Merge runs of text deltas of one part; the result has its run's last sequence number."""
    merged: list[Entry] = []
    run: list[OutputTextDelta] = []
    for entry in entries:
        event = entry.event
        if isinstance(event, OutputTextDelta) and (not run or _same_part(run[0], event)):
            run.append(event)
            continue
        _close_run(run, merged)
        if isinstance(event, OutputTextDelta):
            run = [event]
        else:
            run = []
            merged.append(entry)
    _close_run(run, merged)
    return merged


def _same_part(one: OutputTextDelta, other: OutputTextDelta) -> bool:
    return one.item_id == other.item_id and one.content_index == other.content_index


def _close_run(run: list[OutputTextDelta], merged: list[Entry]) -> None:
    if not run:
        return
    token_ids = None
    if run[0].token_ids is not None:
        token_ids = [token for event in run for token in event.token_ids or ()]
    event = OutputTextDelta(
        sequence_number=run[-1].sequence_number,
        item_id=run[0].item_id,
        output_index=run[0].output_index,
        content_index=run[0].content_index,
        delta="".join(event.delta for event in run),
        logprobs=[entry for event in run for entry in event.logprobs],
        token_ids=token_ids,
    )
    merged.append(Entry(event, encode_event(event)))
