"""The store's three kinds behave alike and leave nothing behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import psutil
import pytest

from server.store import Store, StoreError, StoreKind

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")


async def test_memory_store_when_no_program_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    store = await Store.open()
    assert store.kind is StoreKind.MEMORY
    await store.redis.set("a", "b")
    assert await store.redis.get("a") == b"b"
    await store.close()


@needs_redis
async def test_private_child_serves_and_is_gone_after_close() -> None:
    store = await Store.open()
    assert store.kind is StoreKind.CHILD
    pid = store.child_pid
    assert pid is not None
    directory = Path(store.redis.connection_pool.connection_kwargs["path"]).parent
    assert directory.stat().st_mode & 0o077 == 0
    await store.redis.set("a", "b")
    assert await store.redis.get("a") == b"b"
    await store.close()
    assert not psutil.pid_exists(pid)
    assert not directory.exists()
    await store.close()


@needs_redis
async def test_private_child_starts_again_with_another_epoch() -> None:
    store = await Store.open()
    epoch, pid = store.epoch, store.child_pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(20):
        while store.child_pid == pid or not await _answers(store):
            await asyncio.sleep(0.01)
    assert await store.renew_epoch() != epoch
    await store.close()


async def _answers(store: Store) -> bool:
    try:
        return bool(await store.redis.ping())
    except (OSError, Exception):
        return False


@needs_redis
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="PR_SET_PDEATHSIG is Linux's")
async def test_private_child_dies_with_a_killed_parent() -> None:
    script = (
        "import asyncio\n"
        "from server.store import Store\n"
        "async def main():\n"
        "    store = await Store.open()\n"
        "    print(store.child_pid, flush=True)\n"
        "    await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    child = psutil.Process(int(await parent.stdout.readline()))
    assert child.is_running()
    parent.kill()
    await parent.wait()
    await asyncio.to_thread(child.wait, 20)


@needs_redis
async def test_two_clients_of_one_redis_share_its_epoch() -> None:
    first = await Store.open()
    path = first.redis.connection_pool.connection_kwargs["path"]
    second = await Store.open(f"unix://{path}")
    assert second.kind is StoreKind.REDIS
    assert second.epoch == first.epoch
    await second.close()
    await first.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://127.0.0.1:1/0", "127.0.0.1:1"),
        ("http://example.org", "address"),
        ("unix:///nonexistent/redis.sock", "/nonexistent/redis.sock"),
    ],
)
async def test_unusable_address_is_a_typed_error(url: str, says: str) -> None:
    with pytest.raises(StoreError, match=says):
        await Store.open(url)


async def test_password_is_not_shown() -> None:
    with pytest.raises(StoreError) as caught:
        await Store.open("redis://user:hunter2@127.0.0.1:1/0")
    assert "hunter2" not in str(caught.value)
