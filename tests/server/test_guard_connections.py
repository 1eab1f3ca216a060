"""Bounds against slow or huge peers, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import aiohttp
import pytest

from server.state import CONNECTIONS, METRICS
from tests.server.scripted import Script, ScriptedEngine
from tests.server.serving import Served, serving


async def raw(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", int(served.url.rpartition(":")[2]))


async def end_of(reader: asyncio.StreamReader) -> bytes:
    with contextlib.suppress(ConnectionResetError):
        return await reader.read()
    return b""


def count(served: Served, metric: str) -> bool:
    return metric in served.app[METRICS].render().decode()


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"POST /v1/responses HTTP/1.1\r\nHost: a\r\n"])
async def test_a_head_that_does_not_come_is_cut(sent: bytes) -> None:
    async with serving(head_timeout_s=0.05) as served:
        reader, writer = await raw(served)
        writer.write(sent)
        assert await end_of(reader) == b""
        writer.close()
        assert count(served, 'millrace_connections_cut_total{reason="slow_head"} 1.0')


async def test_a_second_head_is_timed_too() -> None:
    async with serving(head_timeout_s=0.2) as served:
        reader, writer = await raw(served)
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b'"ok"}')
        writer.write(b"GET /hea")
        assert await end_of(reader) == b""
        writer.close()


async def test_a_body_that_does_not_come_is_refused() -> None:
    async with serving(body_timeout_s=0.05) as served:
        reader, writer = await raw(served)
        writer.write(
            b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")
        writer.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10_000 + b"\r\n\r\n",
    ],
)
async def test_huge_heads_are_refused(head: bytes) -> None:
    async with serving() as served:
        reader, writer = await raw(served)
        writer.write(head)
        assert (await reader.readline()).startswith(b"HTTP/1.1 400")
        writer.close()


async def test_huge_bodies_are_refused() -> None:
    async with serving(max_body_bytes=1000) as served:
        status, body = await served.post("/v1/responses", {"input": "a" * 2000})
        assert (status, body["error"]["code"]) == (413, "request_too_large")


async def test_huge_frames_are_refused() -> None:
    async with (
        serving(max_body_bytes=1000) as served,
        served.client.ws_connect("/v1/responses") as socket,
    ):
        await socket.send_str("a" * 2000)
        message = await socket.receive()
        assert message.type is aiohttp.WSMsgType.CLOSE
        assert message.data == aiohttp.WSCloseCode.MESSAGE_TOO_BIG


@pytest.mark.parametrize(
    ("limit", "status", "label"),
    [
        ({"max_connections": 2}, b"503", "all"),
        ({"max_connections_per_address": 2}, b"429", "address"),
    ],
)
async def test_connections_are_bounded(limit: Any, status: bytes, label: str) -> None:
    async with serving(**limit) as served:
        first = [await raw(served) for _ in range(2)]
        while len(served.app[CONNECTIONS]) < 2:
            await asyncio.sleep(0)
        reader, writer = await raw(served)
        answer = await end_of(reader)
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert b"Retry-After: " in answer
        writer.close()
        assert count(served, f'millrace_connections_refused_total{{limit="{label}"}} 1.0')
        for _, one in first:
            one.close()
        while len(served.app[CONNECTIONS]):
            await asyncio.sleep(0)
        reader, writer = await raw(served)
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_reader_that_reads_nothing_is_cut_and_resumes() -> None:
    """The answer is larger than what system and server buffer for a peer that does not read."""
    text = b"x" * 2000
    engine = ScriptedEngine(Script(steps=[list(text)] * 12_000), max_model_len=10**8)
    async with serving(engine, max_unsent_bytes=50_000) as served:
        served.app[CONNECTIONS].limits.unread_s = 0.1
        reader, writer = await raw(served)
        body = b'{"model": "scripted", "input": "hi", "stream": true}'
        writer.write(
            b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        metric = 'millrace_connections_cut_total{reason="slow_reader"} 1.0'
        while not count(served, metric):
            await asyncio.sleep(0.01)
        got = await end_of(reader)
        assert b"response.completed" not in got
        last = int(got.rpartition(b"\nid: ")[2].partition(b"\n")[0])
        assert last > 0
        response_id = got.partition(b'"id":"')[2].partition(b'"')[0].decode()
        writer.close()
        url = f"/v1/responses/{response_id}?stream=true&starting_after={last}"
        async with served.client.get(url) as answer:
            assert answer.status == 200
            line = await answer.content.readuntil(b"\n")
            while not line.startswith(b"id: "):
                line = await answer.content.readuntil(b"\n")
            assert int(line[4:]) > last
