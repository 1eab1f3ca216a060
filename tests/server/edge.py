"""A server in the test's own process, over the scripted engine and a store in memory."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aiohttp import ClientResponse, web
from aiohttp.test_utils import TestClient, TestServer
from blockbuster import blockbuster_ctx
from prometheus_client.parser import text_string_to_metric_families

from server.app import build_app
from server.settings import ServerSettings
from server.store import Store
from tests.server.scripted import ScriptedEngine, byte_tokenizer

NO_PAGE = Path("/nonexistent")


class Answer(NamedTuple):
    """A whole response."""

    status: int
    body: Any
    headers: Mapping[str, str]

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.body["error"]
        return error


class Edge:
    """A running server and a client for it."""

    def __init__(
        self, client: TestClient[web.Request, web.Application], engine: ScriptedEngine
    ) -> None:
        self.client = client
        self.engine = engine

    @property
    def app(self) -> web.Application:
        app = self.client.server.app  # type: ignore[attr-defined]
        assert isinstance(app, web.Application)
        return app

    async def get(self, path: str, **options: Any) -> Answer:
        return await _whole(await self.client.get(path, **options))

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return await _whole(await self.client.post(path, json=body, **options))

    async def send(self, method: str, path: str, **options: Any) -> Answer:
        return await _whole(await self.client.request(method, path, **options))

    async def stream(self, path: str, body: Mapping[str, Any]) -> str:
        """The whole text of an event stream."""
        async with self.client.post(path, json=body) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            return await response.text()

    async def metrics(self) -> dict[str, float]:
        """All samples, named as in PromQL, labels in order of their names."""
        async with self.client.get("/metrics") as response:
            return read_samples(await response.text())


async def _whole(response: ClientResponse) -> Answer:
    async with response:
        data = await response.read()
        is_json = response.content_type == "application/json"
        return Answer(
            response.status, json.loads(data) if is_json else data, dict(response.headers)
        )


def read_samples(text: str) -> dict[str, float]:
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{key}={value}" for key, value in sorted(sample.labels.items()))
            samples[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return samples


def datas(stream: str) -> list[str]:
    """The data of an event stream's frames."""
    lines = stream.splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


@contextlib.asynccontextmanager
async def serving(
    engine: ScriptedEngine | None = None, settings: ServerSettings | None = None
) -> AsyncIterator[Edge]:
    engine = engine or ScriptedEngine()
    store = Store.in_memory()
    await store.renew_epoch()
    settings = settings or ServerSettings(page_dir=NO_PAGE)
    app = build_app(settings, engine, byte_tokenizer(), store)
    server = TestServer(app)
    await server.start_server()
    client = TestClient(server)
    try:
        # Whatever waits without using the CPU (a file, a lock, a sleep) in the event loop fails.
        with blockbuster_ctx("server"):
            yield Edge(client, engine)
    finally:
        await client.close()
        await engine.close()
        await store.close()
