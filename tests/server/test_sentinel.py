"""A Redis under Sentinels: its address, what may be wrong at the start, and another master."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from server.journals import Journals
from server.sentinel import SentinelAddress
from server.store import Store, StoreError
from tests.chaos.processes import RedisServer, free_port, until
from tests.chaos.sentinel import SentinelStore
from tests.server.test_journal import completed, created, delta, numbers, open_journal

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")
HOSTS = (("a", 1), ("b.example", 26379))


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis+sentinel://a:1,b.example/m", SentinelAddress(HOSTS, "m")),
        ("redis+sentinel://a:1,b.example/m/", SentinelAddress(HOSTS, "m")),
        ("rediss+sentinel://a:1,b.example/m/3", SentinelAddress(HOSTS, "m", 3, tls=True)),
        (
            "redis+sentinel://:p%40%2C:@a:1,b.example/m",
            SentinelAddress(HOSTS, "m", password="p@,:"),
        ),
        (
            "redis+sentinel://u:p@[::1]:7,[::2]/m%2Fn?sentinel_password=s%26&sentinel_username=t",
            SentinelAddress(
                (("::1", 7), ("::2", 26379)),
                "m/n",
                username="u",
                password="p",
                options={"sentinel_password": "s&", "sentinel_username": "t"},
            ),
        ),
    ],
)
def test_addresses(url: str, expected: SentinelAddress) -> None:
    assert SentinelAddress.parse(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://u:secret@a:1",
        "redis+sentinel://u:secret@a:1/",
        "redis+sentinel://u:secret@a:1//2",
        "redis+sentinel://u:secret@a:1/m/x",
        "redis+sentinel://u:secret@a:1/m/1/2",
        "redis+sentinel://u:secret@a:0/m",
        "redis+sentinel://u:secret@a:x/m",
        "redis+sentinel://u:secret@,b/m",
        "redis+sentinel://u:secret@/m",
        "redis+sentinel://u:p@a/m?password=secret",
        "redis://u:sec/secret@a:1/m",
        "http://u:secret@a",
    ],
)
def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(StoreError, match="the Redis address cannot be used") as caught:
        Store._at(url)
    assert "secret" not in str(caught.value)


def test_an_address_is_shown_without_passwords() -> None:
    url = "redis+sentinel://u:secret@a:1,b/m?sentinel_password=secret"
    address = SentinelAddress.parse(url)
    assert str(address) == "the master of 'm' by the Sentinels at a:1, b:26379"
    for shown in (str(address), repr(address), f"{address}"):
        assert "secret" not in shown


async def test_no_sentinel_answers() -> None:
    with pytest.raises(StoreError, match=r"none of the Sentinels at .* answers"):
        await Store.open(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/m")


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[int]:
    """One Sentinel, and the master that it watches, each with a password of its own."""
    server = RedisServer(tmp_path / "redis", durable=False)
    port = free_port()
    path = tmp_path / "sentinel.conf"
    path.write_text(
        f"port {port}\nbind 127.0.0.1\ndir {tmp_path}\nrequirepass outer\n"
        f"sentinel monitor m 127.0.0.1 {server.port} 1\nsentinel auth-pass m inner\n"
    )

    def answers() -> bool:
        try:
            with redis.Redis(port=port, password="outer") as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    sentinel = None
    try:
        server.start()
        with server.client() as client:
            client.config_set("requirepass", "inner")
        sentinel = subprocess.Popen(
            ["redis-server", str(path), "--sentinel"], stdout=subprocess.DEVNULL
        )
        until(answers, 20, "the Sentinel answers")
        yield port
    finally:
        if sentinel is not None:
            sentinel.kill()
            sentinel.wait()
        server.stop()


@needs_redis
async def test_passwords_of_both_and_a_service_that_is_unknown(guarded: int) -> None:
    place = f"127.0.0.1:{guarded}"
    outer = "?sentinel_password=outer"
    store = await Store.open(f"redis+sentinel://:inner@{place},127.0.0.1:{free_port()}/m/2{outer}")
    assert store.redis.connection_pool.connection_kwargs["db"] == 2
    assert await store.redis.get("millrace:epoch") == store.epoch
    await store.close()
    await store.close()
    with pytest.raises(StoreError, match="watch no service 'n'"):
        await Store.open(f"redis+sentinel://:inner@{place}/n{outer}")
    with pytest.raises(StoreError, match=r"none of the Sentinels at .* answers"):
        await Store.open(f"redis+sentinel://:inner@{place}/m?sentinel_password=wrong")


@needs_redis
@pytest.mark.timeout(120)
async def test_a_master_that_is_deposed_while_it_lives(tmp_path: Path) -> None:
    """No connection of ours breaks by itself; the log is whole at the new master all the same."""
    group = SentinelStore(tmp_path)
    store = None
    try:
        await asyncio.to_thread(group.start)
        store = await Store.open(group.url)
        journals = Journals(store)
        await journals.start()
        journal = open_journal(journals)
        journal.append(created())
        await journal.written()
        first = group.master
        group.depose()
        while group.master is first:
            journal.append(delta("a"))
            await asyncio.sleep(0.02)
        journal.append(completed())
        await journal.written()
        journals.release(journal)
        length = len(journal)
        assert await numbers(journals.stored.read("t", -1)) == list(range(length))
        await asyncio.to_thread(
            until,
            lambda: len(group.master.journal("t") or ()) == length,
            20,
            "the new master has the whole log",
        )
        await journals.close()
    finally:
        if store is not None:
            await store.close()
        await asyncio.to_thread(group.stop)
