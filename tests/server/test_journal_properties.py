"""Journals against a naive model: lists. Over fakeredis and over a real redis-server."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from redis.exceptions import ConnectionError as RedisConnectionError

from server.events import OutputTextDelta, ResponseCompleted, ResponseCreated, ResponseFailed
from server.journal import Entry, Journal, JournalError, JournalState
from server.journals import JournalNotFound, Journals
from server.response_object import failed_event
from server.store import Store, StoreUnavailable

T = TypeVar("T")


def _no_failure(code: str, message: str) -> ResponseFailed:
    raise AssertionError(f"the journal broke: {code}")


class _Faulty(Journals):
    """Loses the answer of the next ``lost`` writes, after the store has taken them.

    What has just ended stays so: the machine knows no time.
    """

    lost = 0

    def _forget_ended(self) -> None:
        pass

    async def _settle_write(self, *arguments: Any) -> None:
        if self.lost:
            self.lost -= 1
            raise RedisConnectionError("the answer is lost")
        await super()._settle_write(*arguments)


class _Reader:
    """A follower that reads when it is told to, and what it has got."""

    def __init__(self, turn: _Turn, batches: AsyncIterator[list[Entry]], after: int) -> None:
        self.turn = turn
        self.batches = batches
        self.position = after + 1
        self.ended = False
        self.text = "".join(turn.texts[: self.position])

    async def read(self, num_batches: int) -> None:
        """Read up to so many batches; wait for none."""
        for _ in range(num_batches):
            pending = asyncio.ensure_future(anext(self.batches, None))
            await asyncio.wait([pending], timeout=0 if not self.turn.sealed else 5)
            if not pending.done():
                # The follower waits for more: it would go on from there, but this one leaves.
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
                self.ended = True
                return
            batch = pending.result()
            if batch is None:
                self.ended = True
                assert self.position >= len(self.turn.texts)
                assert self.turn.sealed
                return
            for entry in batch:
                self._take(entry)

    def _take(self, entry: Entry) -> None:
        number = entry.event.sequence_number
        assert number >= self.position, "an event came twice or out of order"
        if isinstance(entry.event, OutputTextDelta):
            self.text += entry.event.delta
        else:
            assert number == self.position, "an event is missing"
        self.position = number + 1
        assert self.text == "".join(self.turn.texts[: self.position])


class _Turn:
    """The model: the text of each event, "" where it has none."""

    def __init__(self, name: str, journal: Journal) -> None:
        self.name = name
        self.journal = journal
        self.texts: list[str] = []
        self.sealed = False


class JournalMachine(RuleBasedStateMachine):
    """Turns are opened, written, resumed, read, sealed and released in any order."""

    turns = Bundle("turns")
    ended = Bundle("ended")
    readers = Bundle("readers")
    real_redis = False

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.count = 0
        self.run(self._start())

    async def _start(self) -> None:
        if self.real_redis:
            self.store = await Store.open()
        else:
            self.store = Store.in_memory()
            await self.store.renew_epoch()
        self.journals = _Faulty(self.store)
        await self.journals.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return self.runner.run(work)

    def teardown(self) -> None:
        self.run(self._stop())
        self.runner.close()

    async def _stop(self) -> None:
        await self.journals.close()
        await self.store.close()

    @rule(target=turns)
    def open(self) -> _Turn:
        name = f"t{self.count}"
        self.count += 1

        def failure(code: str, message: str) -> ResponseFailed:
            return failed_event({"id": name}, code, message)

        async def begin() -> _Turn:
            turn = _Turn(name, self.journals.open(name, keep_s=100, failure=failure))
            turn.journal.append(ResponseCreated(response={"id": name}))
            turn.texts.append("")
            return turn

        return self.run(begin())

    @rule(turn=turns, texts=st.lists(st.text(max_size=3), min_size=1, max_size=90))
    def append(self, turn: _Turn, texts: list[str]) -> None:
        async def work() -> None:
            for text in texts:
                event = OutputTextDelta(item_id="m", output_index=0, content_index=0, delta=text)
                turn.journal.append(event)
                turn.texts.append(text)

        self.run(work())

    @rule(turn=turns)
    def written(self, turn: _Turn) -> None:
        self.run(turn.journal.written())
        assert turn.journal.num_visible == len(turn.texts)

    @rule(turn=consumes(turns), target=ended)
    def seal(self, turn: _Turn) -> _Turn:
        async def work() -> None:
            turn.journal.append(ResponseCompleted(response={"id": turn.name}))
            turn.texts.append("")
            turn.sealed = True
            with pytest.raises(JournalError):
                turn.journal.append(ResponseCompleted(response={}))
            await turn.journal.written()

        self.run(work())
        return turn

    @rule(turn=ended)
    def release(self, turn: _Turn) -> None:
        self.journals.release(turn.journal)

    @rule(turn=turns, data=st.data(), target=readers)
    def resume_live(self, turn: _Turn, data: st.DataObject) -> _Reader:
        return self._resume(turn, data)

    @rule(turn=ended, data=st.data(), target=readers)
    def resume_ended(self, turn: _Turn, data: st.DataObject) -> _Reader:
        return self._resume(turn, data)

    def _resume(self, turn: _Turn, data: st.DataObject) -> _Reader:
        after = data.draw(st.integers(-1, len(turn.texts) - 1))
        # A client can only have what was shown.
        after = min(after, turn.journal.num_visible - 1)
        batches = self.run(self.journals.follow(turn.name, None if after < 0 else after))
        return _Reader(turn, batches, after)

    @rule(reader=readers, num_batches=st.integers(1, 3))
    def read(self, reader: _Reader, num_batches: int) -> None:
        if not reader.ended:
            self.run(reader.read(num_batches))

    @rule(count=st.integers(1, 2))
    def lose_answers(self, count: int) -> None:
        self.journals.lost = count

    @rule()
    def lose_history(self) -> None:
        """The turns that run survive that, and those that have just ended."""

        async def work() -> None:
            live = [self.journals._live[name] for name in self.journals._live]
            for journal in live:
                await journal.written()
            await self.store.redis.flushall()
            probe = self.journals.open(
                "probe", keep_s=9, failure=lambda a, b: failed_event({}, a, b)
            )
            probe.append(ResponseCompleted(response={}))
            await probe.written()
            self.journals.release(probe)
            while self.journals._lost:
                await asyncio.sleep(0)
            for journal in live:
                if journal.turn_id in self.journals._live:
                    stored = await self._stored(journal.turn_id)
                    assert stored == [entry.data for entry in journal.entries()]

        self.run(work())

    async def _stored(self, name: str) -> list[bytes]:
        rows: Any = await self.store.redis.xrange(self.store.key("journal", name))
        return [fields[b"d"] for _, fields in rows]

    @rule(turn=ended)
    def stored_is_the_log(self, turn: _Turn) -> None:
        stored = self.run(self._stored(turn.name))
        assert stored == [entry.data for entry in turn.journal.entries()]

    @rule(name=st.sampled_from(["x", "y"]))
    def unknown(self, name: str) -> None:
        """While others may not have written again what was lost, nothing is told missing."""
        with pytest.raises((JournalNotFound, StoreUnavailable)):
            self.run(self.journals.follow(name))

    @invariant()
    def integrity(self) -> None:
        for journal in self.journals._live.values():
            entries = journal.entries()
            assert [entry.event.sequence_number for entry in entries] == list(range(len(entries)))
            assert journal.num_visible <= len(entries)
            assert not journal.broken
            terminal = [isinstance(entry.event, ResponseCompleted) for entry in entries]
            assert terminal.count(True) == (journal.state is JournalState.SEALED)


class RealRedisMachine(JournalMachine):
    """The same over a real redis-server."""

    real_redis = True


TestJournalInMemory = JournalMachine.TestCase
TestJournalInMemory.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestJournalInRedis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="no redis-server"
)(RealRedisMachine.TestCase)
TestJournalInRedis.settings = settings(max_examples=10, stateful_step_count=25, deadline=None)
