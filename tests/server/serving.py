"""A whole server over a scripted engine, on a real socket, as ``millrace serve`` runs it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import aiohttp
from aiohttp import web

from server.app import build_app
from server.settings import ServerSettings
from server.state import CONNECTIONS, JOURNALS, TURNS
from server.store import Store
from tests.server.scripted import ScriptedEngine, byte_tokenizer

__all__ = ["Served", "memory_store", "read_events", "serving"]


class Served(NamedTuple):
    """A running server and a client that is at home there."""

    app: web.Application
    engine: ScriptedEngine
    client: aiohttp.ClientSession
    url: str

    async def post(self, path: str, body: Any, **options: Any) -> tuple[int, Any]:
        """POST JSON; return status and body."""
        async with self.client.post(path, json=body, **options) as answer:
            return answer.status, await answer.json()

    async def get(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.client.get(path, **options) as answer:
            return answer.status, await answer.json()

    async def delete(self, path: str, **options: Any) -> tuple[int, Any]:
        async with self.client.delete(path, **options) as answer:
            return answer.status, await answer.json()

    async def stream(self, path: str, body: Any, **options: Any) -> list[dict[str, Any]]:
        """POST with ``stream`` and return the events' data."""
        async with self.client.post(path, json={**body, "stream": True}, **options) as answer:
            assert answer.status == 200, await answer.text()
            return [data async for _, _, data in read_events(answer)]

    async def idle(self) -> None:
        """Wait until no turn runs, then check that nothing is left of any."""
        await self.app[TURNS].until_idle()
        await self.engine.settle()
        assert self.app[TURNS].live == 0
        assert self.app[JOURNALS].num_live == 0
        assert not self.engine.running
        left = [task.get_name() for task in asyncio.all_tasks() if "turn-" in task.get_name()]
        assert not left


async def memory_store() -> Store:
    store = Store.in_memory()
    await store.renew_epoch()
    return store


@asynccontextmanager
async def serving(
    engine: ScriptedEngine | None = None,
    store: Store | None = None,
    headers: dict[str, str] | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """Serve on a free port; everything ends with the block."""
    engine = engine or ScriptedEngine()
    own_store = store is None
    store = store or await memory_store()
    settings.setdefault("page_dir", Path("/nonexistent"))
    app = build_app(ServerSettings(**settings), cast(Any, engine), byte_tokenizer(), store)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    sock = socket.create_server(("127.0.0.1", 0))
    (listener,) = await app[CONNECTIONS].listen(runner, [sock])
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    try:
        async with aiohttp.ClientSession(url, headers=headers) as client:
            yield Served(app, engine, client, url)
    finally:
        listener.close()
        await runner.cleanup()
        await engine.close()
        if own_store:
            await store.close()


async def read_events(
    answer: aiohttp.ClientResponse,
) -> AsyncIterator[tuple[str | None, str | None, Any]]:
    """Yield (event, id, data) of a text/event-stream."""
    event = number = None
    async for raw in answer.content:
        line = raw.decode().rstrip("\n")
        name, _, value = line.partition(": ")
        if name == "event":
            event = value
        elif name == "id":
            number = value
        elif name == "data":
            yield event, number, value if value == "[DONE]" else json.loads(value)
            event = number = None
