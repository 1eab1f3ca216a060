"""A real Redis that stands still, is full, or comes back with less: turns wait, none is silent."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator

import pytest

from server.events import Event, ResponseFailed
from server.journal import Entry, Journal
from server.journals import Journals
from server.replicas import LEASE_S
from server.store import Store
from tests.server.test_journal import completed, created, delta, open_journal

pytestmark = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    opened = await Store.open()
    yield opened
    await opened.close()


async def begun(journals: Journals) -> Journal:
    await journals.start()
    journal = open_journal(journals)
    journal.append(created())
    journal.append(delta("a"))
    await journal.written()
    return journal


async def read(batches: AsyncIterator[list[Entry]]) -> list[Event]:
    return [entry.event async for batch in batches for entry in batch]


def numbers(events: list[Event]) -> list[int]:
    return [event.sequence_number for event in events]


async def test_a_store_that_stood_still_costs_nothing(store: Store) -> None:
    """Not even a lease: everybody's has run out then, and nobody takes anybody for dead."""
    here, there = Journals(store), Journals(store)
    await there.start()
    journal = await begun(here)
    readers = [asyncio.create_task(read(await one.follow("t"))) for one in (here, there)]
    assert store.child_pid is not None
    os.kill(store.child_pid, signal.SIGSTOP)
    journal.append(delta("b"))
    await asyncio.sleep(LEASE_S * 1.5)  # How long it stands still.
    os.kill(store.child_pid, signal.SIGCONT)
    dead = [await one.replicas.dead() for one in (here, there)]
    await journal.written()
    await asyncio.gather(here.replicas.beat(), there.replicas.beat())
    dead += [await one.replicas.dead() for one in (here, there)]
    assert dead == [[], [], [], []]
    journal.append(completed())
    for reader in readers:
        assert numbers(await reader) == [0, 1, 2, 3]
    await here.close()
    await there.close()


async def test_a_full_store_is_waited_for(store: Store) -> None:
    journals = Journals(store)
    journal = await begun(journals)
    reader = asyncio.create_task(read(journal.follow()))
    await store.redis.config_set("maxmemory-policy", "noeviction")
    await store.redis.config_set("maxmemory", 1)
    failures = asyncio.create_task(_failed_write(journals))
    journal.append(delta("b"))
    await failures
    assert journal.num_visible == 2
    await store.redis.config_set("maxmemory", 0)
    journal.append(delta("c"))
    journal.append(completed())
    assert numbers(await reader) == [0, 1, 2, 3, 4]
    journals.release(journal)
    assert numbers(await read(journals.stored.read("t", -1))) == [0, 1, 2, 3, 4]
    await journals.close()


async def _failed_write(journals: Journals) -> None:
    while not journals._unverified:
        await asyncio.sleep(0.001)


async def test_a_store_that_stays_full_fails_the_turn(store: Store) -> None:
    journals = Journals(store, patience_s=0.2)
    journal = await begun(journals)
    await store.redis.config_set("maxmemory-policy", "noeviction")
    await store.redis.config_set("maxmemory", 1)
    journal.append(delta("never shown"))
    events = await read(journal.follow())
    assert numbers(events) == [0, 1, 2]
    assert isinstance(events[2], ResponseFailed)
    assert events[2].response["error"]["code"] == "store_unavailable"
    assert "t" in journals.broken_off
    await store.redis.config_set("maxmemory", 0)
    await journals.close()


@pytest.mark.parametrize("kept", [0, 1, 3])
async def test_a_failover_that_lost_the_last_events(store: Store, kept: int) -> None:
    """The store is the same one, but an older state of it: what is missing is written again."""
    journals = Journals(store)
    journal = await begun(journals)
    key = journals.stored.key("t")
    texts = ["b", "c", "d"]
    for text in texts[:kept]:
        journal.append(delta(text))
    await journal.written()
    older = await store.redis.dump(key)
    assert older is not None
    for text in texts[kept:]:
        journal.append(delta(text))
    await journal.written()
    await store.redis.restore(key, 0, older, replace=True)
    assert store.child_pid is not None
    # A failover breaks the connections.
    await store.redis.client_kill_filter(_type="normal", skipme=False)
    journals._unverified = True
    journal.append(completed())
    await journal.written()
    journals.release(journal)
    assert numbers(await read(journals.stored.read("t", -1))) == list(range(6))
    await journals.close()


async def test_a_reader_waits_for_a_store_that_is_away(store: Store) -> None:
    here, there = Journals(store), Journals(store)
    await there.start()
    journal = await begun(here)
    reader = asyncio.create_task(read(await there.follow("t")))
    assert store.child_pid is not None
    os.kill(store.child_pid, signal.SIGKILL)
    journal.append(delta("b"))
    await journal.written()
    journal.append(completed())
    assert numbers(await reader) == [0, 1, 2, 3]
    await here.close()
    await there.close()
