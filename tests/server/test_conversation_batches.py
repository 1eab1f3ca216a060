"""A conversation of thousands of items is read, copied and written without holding the loop."""

from __future__ import annotations

import asyncio
import shutil
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from server.conversations.batches import BATCH, batches
from server.conversations.store import MAX_ITEMS, Conversations
from server.journals import Journals
from server.store import Store

OWNER = "me"
RETENTION_S = 3600


def item(number: int) -> dict[str, Any]:
    content = [{"type": "input_text", "text": f"Of stone {number}."}]
    return {"id": f"msg_{number:032d}", "type": "message", "role": "user", "content": content}


@pytest.fixture
async def store() -> AsyncIterator[Store]:
    if shutil.which("redis-server") is None:
        pytest.skip("no redis-server: the one in this process would be counted, too")
    store = await Store.open()
    yield store
    await store.close()


@pytest.fixture
def conversations(store: Store) -> Conversations:
    return Conversations(store, Journals(store), retention_s=RETENTION_S)


async def heaviest_turn(work: Awaitable[object], monkeypatch: pytest.MonkeyPatch) -> int:
    """Most calls of functions that one turn of the loop made meanwhile.

    They are what a turn's length grows with, and not with what else the machine does.
    """
    counts: list[int] = []

    def count(_frame: object, event: str, _argument: object) -> None:
        counts[-1] += event in ("call", "c_call")

    def run(handle: asyncio.Handle) -> None:
        counts.append(0)
        sys.setprofile(count)
        try:
            plain(handle)
        finally:
            sys.setprofile(None)

    plain = asyncio.Handle._run
    with monkeypatch.context() as patch:
        patch.setattr(asyncio.Handle, "_run", run)
        await asyncio.ensure_future(work)
    return max(counts)


Work = Callable[[Conversations, str], Awaitable[object]]
WORKS: dict[str, Work] = {
    "fork": lambda all_of_them, one: all_of_them.fork(one, OWNER),
    "read": lambda all_of_them, one: all_of_them.items(one, OWNER),
    "tree": lambda all_of_them, one: all_of_them.tree(one, OWNER),
    "turn": lambda all_of_them, one: all_of_them.claim(one, OWNER, "turn", num_new=2),
}


@pytest.mark.parametrize("name", WORKS)
async def test_the_loop_is_held_no_longer_for_many_items_than_for_a_few(
    conversations: Conversations, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    heaviest = []
    for number in (2 * BATCH, MAX_ITEMS - 2):
        items = [item(at) for at in range(number)]
        record = await conversations.create(OWNER, {}, items)
        work = WORKS[name](conversations, record.conversation_id)
        heaviest.append(await heaviest_turn(work, monkeypatch))
    few, many = heaviest
    # To walk over the ids is a call or two each; to read, copy and write an item is many.
    assert many < few + 2 * MAX_ITEMS, (few, many)


async def test_a_large_fork_is_whole_and_goes_on(conversations: Conversations) -> None:
    items = [item(at) for at in range(2 * BATCH + 7)]
    first = await conversations.create(OWNER, {}, items)
    fork = (await conversations.fork(first.conversation_id, OWNER)).conversation_id
    await conversations.append(fork, [item(9999)])
    copies = await conversations.items(fork, OWNER)
    assert [one["content"] for one in copies] == [one["content"] for one in [*items, item(9999)]]
    tree = await conversations.tree(fork, OWNER)
    assert [one["id"] for one in tree] == [one["id"] for one in copies]
    assert [one["parent_id"] for one in tree] == [None, *(one["id"] for one in copies[:-1])]
    for part in ("items", "order"):
        key = f"millrace:conversation:{fork}:{part}"
        assert await conversations._redis.ttl(key) > RETENTION_S - 60


async def test_a_fork_that_breaks_off_leaves_nothing_for_long(
    conversations: Conversations, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await conversations.create(OWNER, {}, [item(at) for at in range(2 * BATCH)])

    def die(*_: object) -> None:
        raise ConnectionError("in the moment before the record is written")

    monkeypatch.setattr(conversations._records, "write", die)
    with pytest.raises(Exception, match="before the record"):
        await conversations.fork(first.conversation_id, OWNER, fork_id="conv_lost")
    assert not await conversations.exists("conv_lost")
    keys = [key async for key in conversations._redis.scan_iter("*conv_lost*")]
    assert len(keys) == 2
    for key in keys:
        assert 0 < await conversations._redis.ttl(key) <= 60


async def test_others_run_between_two_parts() -> None:
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    task = asyncio.create_task(other())
    await asyncio.sleep(0)
    parts = [(len(part), turns) async for part in batches(range(3 * BATCH + 1))]
    task.cancel()
    assert [length for length, _ in parts] == [BATCH, BATCH, BATCH, 1]
    assert len({seen for _, seen in parts}) == len(parts)
