"""The journal: one turn's log, its writer, its followers, and what a broken store does to them."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from server.background import end
from server.events import (
    Discontinuity,
    Event,
    OutputTextDelta,
    ResponseCompleted,
    ResponseCreated,
    ResponseFailed,
    decode_event,
    encode_event,
)
from server.journal import LAG_EVENTS, Entry, Journal, JournalError, JournalState, merge_deltas
from server.journals import JournalNotFound, Journals
from server.response_object import failed_event
from server.store import Store

KINDS = ["memory"] + (["child"] if shutil.which("redis-server") else [])


@pytest.fixture(params=KINDS)
async def store(request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    if request.param == "memory":
        opened = Store.in_memory()
        await opened.renew_epoch()
    else:
        opened = await Store.open()
    yield opened
    await opened.close()


@pytest.fixture
async def journals(store: Store) -> AsyncIterator[Journals]:
    running = Journals(store, patience_s=0.3)
    await running.start()
    yield running
    await running.close()


def open_journal(journals: Journals, turn_id: str = "t") -> Journal:
    def failure(code: str, message: str) -> ResponseFailed:
        return failed_event({"id": turn_id}, code, message)

    return journals.open(turn_id, keep_s=100, failure=failure)


def created() -> Event:
    return ResponseCreated(response={"id": "t", "status": "in_progress"})


def delta(text: str, item: str = "m") -> OutputTextDelta:
    return OutputTextDelta(item_id=item, output_index=0, content_index=0, delta=text)


def completed() -> Event:
    return ResponseCompleted(response={"id": "t", "status": "completed"})


async def read(batches: AsyncIterator[list[Entry]]) -> list[Event]:
    return [entry.event async for batch in batches for entry in batch]


async def numbers(batches: AsyncIterator[list[Entry]]) -> list[int]:
    return [event.sequence_number for event in await read(batches)]


async def test_live_and_stored_followers_see_the_same_bytes(journals: Journals) -> None:
    journal = open_journal(journals)
    live = asyncio.create_task(_data(journal.follow()))
    for event in (created(), delta("a"), delta("é"), completed()):
        journal.append(event)
    await journal.written()
    journals.release(journal)
    stored = await _data(journals.stored.read("t", -1))
    assert stored == await live
    assert [decode_event(data).sequence_number for data in stored] == [0, 1, 2, 3]


async def _data(batches: AsyncIterator[list[Entry]]) -> list[bytes]:
    return [entry.data async for batch in batches for entry in batch]


@pytest.mark.parametrize("after", [None, 0, 1, 2, 3, 9])
async def test_resuming_gives_what_comes_after(journals: Journals, after: int | None) -> None:
    journal = open_journal(journals)
    for event in (created(), delta("a"), delta("b"), completed()):
        journal.append(event)
    await journal.written()
    wanted = list(range(0 if after is None else after + 1, 4))
    assert await numbers(journal.follow(after)) == wanted
    journals.release(journal)
    assert await numbers(await journals.follow("t", after)) == wanted


async def test_nothing_is_shown_before_it_is_written(
    journals: Journals, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = asyncio.Event()
    real = Journals._write_group

    async def gated(self: Journals, group: Any) -> None:
        await gate.wait()
        await real(self, group)

    monkeypatch.setattr(Journals, "_write_group", gated)
    journal = open_journal(journals)
    journal.append(created())
    follower = journal.follow()
    first = asyncio.ensure_future(anext(follower))
    for _ in range(20):
        await asyncio.sleep(0)
    assert not first.done()
    gate.set()
    assert (await first)[0].event.sequence_number == 0
    assert await store.redis.xlen(store.key("journal", "t")) == 1
    journal.append(completed())
    await journal.written()


async def test_sealed_journal_refuses_more(journals: Journals) -> None:
    journal = open_journal(journals)
    journal.append(created())
    journal.append(completed())
    assert journal.state is JournalState.SEALED
    with pytest.raises(
        JournalError, match="t has ended with ResponseCompleted; ResponseFailed cannot follow"
    ):
        journal.append(failed_event({}, "x", "y"))
    assert len(journal) == 2


async def test_unknown_turn(journals: Journals) -> None:
    with pytest.raises(JournalNotFound, match="no event log of nobody"):
        await journals.follow("nobody")


async def test_everything_has_a_time_to_live(journals: Journals, store: Store) -> None:
    journal = open_journal(journals)
    journal.append(created())
    await journal.written()
    assert await store.redis.ttl(store.key("journal", "t")) > 3600
    journal.append(completed())
    await journal.written()
    assert 0 < await store.redis.ttl(store.key("journal", "t")) <= 100
    for key in await store.redis.keys("*"):
        assert key == b"millrace:epoch" or await store.redis.ttl(key) > 0


async def test_many_turns_share_a_round_trip(
    journals: Journals, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups: list[int] = []
    real = Journals._write_group

    async def counted(self: Journals, group: Any) -> None:
        groups.append(len(group))
        await real(self, group)

    monkeypatch.setattr(Journals, "_write_group", counted)
    opened = [open_journal(journals, f"t{number}") for number in range(100)]
    for journal in opened:
        journal.append(created())
    for journal in opened:
        await journal.written()
    assert groups == [100]
    for journal in opened:
        journal.append(completed())


async def test_follower_that_lags_gets_merged_deltas(journals: Journals) -> None:
    journal = open_journal(journals)
    journal.append(created())
    follower = journal.follow()
    got = await anext(follower)
    waiting = asyncio.ensure_future(anext(follower))
    await asyncio.sleep(0)
    journal.append(delta("."))
    got += await waiting
    texts = [str(number) for number in range(LAG_EVENTS * 2)]
    for text in texts:
        journal.append(delta(text))
    journal.append(completed())
    await journal.written()
    async for batch in follower:
        got += batch
    deltas = [entry.event for entry in got if isinstance(entry.event, OutputTextDelta)]
    assert len(deltas) == 2
    assert deltas[1].delta == "".join(texts)
    assert deltas[1].sequence_number == 1 + len(texts)
    assert decode_event(got[-2].data) == deltas[1]
    # One that starts late has not lagged: it gets every event.
    assert await numbers(journal.follow()) == list(range(len(texts) + 3))


def test_only_deltas_of_the_same_part_merge() -> None:
    entries = []
    events: list[Event] = [delta("a"), delta("b"), delta("c", "n"), created(), delta("d")]
    for number, event in enumerate(events):
        event = decode_event(encode_event(event))
        entries.append(_numbered(event, number))
    merged = merge_deltas(entries)
    assert [entry.event.sequence_number for entry in merged] == [1, 2, 3, 4]
    assert isinstance(merged[0].event, OutputTextDelta)
    assert merged[0].event.delta == "ab"


def _numbered(event: Event, number: int) -> Entry:
    import msgspec

    msgspec.structs.force_setattr(event, "sequence_number", number)
    return Entry(event, encode_event(event))


async def test_repeated_write_does_not_double(
    journals: Journals, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store takes the events, but its answer is lost: the write is repeated."""
    real = Journals._settle_write
    lost = [True, True]

    async def losing(self: Journals, *arguments: Any) -> None:
        if lost:
            lost.pop()
            raise RedisConnectionError("the answer is lost")
        await real(self, *arguments)

    monkeypatch.setattr(Journals, "_settle_write", losing)
    journal = open_journal(journals)
    for event in (created(), delta("a"), completed()):
        journal.append(event)
    assert await numbers(journal.follow()) == [0, 1, 2]
    assert await store.redis.xlen(store.key("journal", "t")) == 3
    assert not journal.broken


async def test_lost_history_is_written_again(journals: Journals, store: Store) -> None:
    journal = open_journal(journals)
    journal.append(created())
    journal.append(delta("a"))
    await journal.written()
    await store.redis.flushall()
    journal.append(delta("b"))
    journal.append(completed())
    await journal.written()
    journals.release(journal)
    assert await numbers(journals.stored.read("t", -1)) == [0, 1, 2, 3]


async def test_an_older_state_of_the_store_is_noticed(journals: Journals, store: Store) -> None:
    """A failover without an error: no connection breaks, and what is written has a gap before it.
    The turn that ended just before is whole again too."""
    ended, running = open_journal(journals, "ended"), open_journal(journals, "running")
    for journal in (ended, running):
        journal.append(created())
        journal.append(delta("a"))
        await journal.written()
    older = {key: await store.redis.dump(key) async for key in store.redis.scan_iter()}
    ended.append(completed())
    running.append(delta("b"))
    await asyncio.gather(ended.written(), running.written())
    journals.release(ended)
    for key, value in older.items():
        assert value is not None
        await store.redis.restore(key, 0, value, replace=True)
    running.append(delta("c"))
    await running.written()
    running.append(completed())
    await running.written()
    journals.release(running)
    for turn_id, length in (("ended", 3), ("running", 5)):
        stored = [entry.event for entry in await journals.stored.entries(turn_id)]
        assert [event.sequence_number for event in stored] == list(range(length))
        assert await numbers(journals.stored.read(turn_id, -1)) == list(range(length))


async def test_an_older_state_is_noticed_without_a_write(journals: Journals, store: Store) -> None:
    journal = open_journal(journals)
    rewritten = asyncio.Event()

    async def note() -> None:
        rewritten.set()

    journal.on_rewritten = note
    journal.append(created())
    await journal.written()
    older = {key: await store.redis.dump(key) async for key in store.redis.scan_iter()}
    journal.append(completed())
    await journal.written()
    journals.release(journal)
    for key, value in older.items():
        assert value is not None
        await store.redis.restore(key, 0, value, replace=True)
    await asyncio.wait_for(rewritten.wait(), 20)
    assert await numbers(journals.stored.read("t", -1)) == [0, 1]


async def test_hole_in_the_stored_log_is_told(journals: Journals, store: Store) -> None:
    journal = open_journal(journals)
    for event in (created(), delta("a"), delta("b"), delta("c"), completed()):
        journal.append(event)
    await journal.written()
    journals.release(journal)
    await store.redis.xdel(store.key("journal", "t"), "0-3", "0-4")
    events = await read(journals.stored.read("t", 0))
    assert [event.sequence_number for event in events] == [1, 3, 4]
    gap = events[1]
    assert isinstance(gap, Discontinuity)
    assert (gap.first_lost, gap.last_lost) == (2, 3)


async def test_store_that_stays_away_fails_the_turn(
    journals: Journals, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = open_journal(journals)
    journal.append(created())
    await journal.written()

    async def away(self: Journals, group: Any) -> None:
        raise RedisConnectionError("gone")

    monkeypatch.setattr(Journals, "_write_group", away)
    journal.append(delta("never shown"))
    events = await read(journal.follow())
    assert [event.sequence_number for event in events] == [0, 1]
    assert isinstance(events[1], ResponseFailed)
    assert events[1].response["error"]["code"] == "store_unavailable"
    with pytest.raises(JournalError):
        journal.append(completed())


@pytest.mark.skipif("child" not in KINDS, reason="no redis-server")
async def test_redis_that_is_killed_costs_a_running_turn_nothing() -> None:
    store = await Store.open()
    journals = Journals(store)
    await journals.start()
    journal = open_journal(journals)
    reader = asyncio.create_task(numbers(journal.follow()))
    journal.append(created())
    journal.append(delta("a"))
    await journal.written()
    assert store.child_pid is not None
    os.kill(store.child_pid, signal.SIGKILL)
    for _ in range(50):
        journal.append(delta("b"))
        await asyncio.sleep(0.005)
    journal.append(completed())
    await journal.written()
    assert not journal.broken
    journals.release(journal)
    assert await reader == list(range(53))
    assert await numbers(journals.stored.read("t", -1)) == list(range(53))
    await journals.close()
    await store.close()


async def test_reader_ends_the_turn_of_a_dead_replica(store: Store) -> None:
    dead, alive = Journals(store), Journals(store)
    await dead.start()
    await alive.start()
    journal = open_journal(dead)
    journal.append(created())
    journal.append(delta("a"))
    await journal.written()
    assert await alive.settle("t") is None
    await end(*dead._tasks)
    await store.redis.delete(dead.replicas.key(dead.replica_id))
    readers = [read(await alive.follow("t")) for _ in range(3)]
    for events in await asyncio.gather(*readers):
        assert [event.sequence_number for event in events] == [0, 1, 2]
        assert isinstance(events[2], ResponseFailed)
        assert events[2].response["id"] == "t"
    assert await store.redis.xlen(store.key("journal", "t")) == 3
    await alive.close()


async def test_replica_taken_for_dead_gives_in(store: Store) -> None:
    slow, other = Journals(store), Journals(store)
    await slow.start()
    await other.start()
    journal = open_journal(slow)
    journal.append(created())
    await journal.written()
    await end(slow._tasks[1])
    await store.redis.delete(slow.replicas.key(slow.replica_id))
    assert await other.settle("t") is not None
    journal.append(delta("too late"))
    events = await read(journal.follow())
    assert [type(event) for event in events] == [ResponseCreated, ResponseFailed]
    assert journal.broken
    assert await numbers(await other.follow("t")) == [0, 1]
    await slow.close()
    await other.close()


async def test_follower_on_another_replica_sees_events_as_they_come(store: Store) -> None:
    here, there = Journals(store), Journals(store)
    await here.start()
    await there.start()
    journal = open_journal(here)
    journal.append(created())
    await journal.written()
    follower = await there.follow("t")
    assert len(await anext(follower)) == 1
    waiting = asyncio.ensure_future(anext(follower))
    journal.append(delta("a"))
    assert (await waiting)[0].event.sequence_number == 1
    journal.append(completed())
    assert [len(batch) async for batch in follower] == [1]
    await here.close()
    await there.close()
