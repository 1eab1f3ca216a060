"""Bounds against slow or huge peers, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest

from server.state import CONNECTIONS, METRICS
from tests.server.scripted import Script, ScriptedEngine
from tests.server.serving import Served, read_events, serving


@contextlib.asynccontextmanager
async def raw(
    served: Served, receive_bytes: int = 2**16
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Open a connection whose receiving side buffers little."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.setblocking(False)
    port = int(served.url.rpartition(":")[2])
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=receive_bytes)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def end_of(reader: asyncio.StreamReader) -> bytes:
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := await reader.read(2**16):
            parts.append(part)
    return b"".join(parts)


def count(served: Served, metric: str) -> bool:
    return metric in served.app[METRICS].render().decode()


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"POST /v1/responses HTTP/1.1\r\nHost: a\r\n"])
async def test_a_head_that_does_not_come_is_cut(sent: bytes) -> None:
    async with serving(head_timeout_s=0.05) as served, raw(served) as (reader, writer):
        writer.write(sent)
        assert await end_of(reader) == b""
        assert count(served, 'millrace_connections_cut_total{reason="slow_head"} 1.0')


async def test_a_second_head_is_timed_too() -> None:
    async with serving(head_timeout_s=0.2) as served, raw(served) as (reader, writer):
        writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        await reader.readuntil(b'"ok"}')
        writer.write(b"GET /hea")
        assert await end_of(reader) == b""


async def test_a_body_that_does_not_come_is_refused() -> None:
    async with serving(body_timeout_s=0.05) as served, raw(served) as (reader, writer):
        writer.write(
            b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n{"
        )
        assert (await reader.readline()).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "head",
    [
        b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 10_000 + b"\r\n\r\n",
    ],
)
async def test_huge_heads_are_refused(head: bytes) -> None:
    async with serving() as served, raw(served) as (reader, writer):
        writer.write(head)
        assert b" 400 " in await reader.readline()


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
        async with raw(served), raw(served):
            while len(served.app[CONNECTIONS]) < 2:
                await asyncio.sleep(0)
            async with raw(served) as (reader, _):
                answer = await end_of(reader)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert b"Retry-After: " in answer
            assert count(served, f'millrace_connections_refused_total{{limit="{label}"}} 1.0')
        while len(served.app[CONNECTIONS]):
            await asyncio.sleep(0)
        async with raw(served) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_a_reader_that_reads_nothing_is_cut_and_resumes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The answer is larger than what both sides buffer for a peer that does not read."""
    engine = ScriptedEngine(Script(steps=[[120] * 1000] * 100), max_model_len=10**7)
    async with serving(engine, max_unsent_bytes=20_000) as served:
        cut = asyncio.Event()
        monkeypatch.setattr(served.app[METRICS], "connection_cut", lambda _: cut.set())
        served.app[CONNECTIONS].limits.unread_s = 0.1
        body = b'{"model": "scripted", "input": "hi", "stream": true}'
        async with raw(served, 4096) as (reader, writer):
            writer.write(
                b"POST /v1/responses HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            await cut.wait()
            got = await end_of(reader)
        assert b"response.completed" not in got
        last = int(got.rpartition(b"\nid: ")[2].partition(b"\n")[0])
        assert last > 0
        response_id = got.partition(b'"id":"')[2].partition(b'"')[0].decode()
        url = f"/v1/responses/{response_id}?stream=true&starting_after={last}"
        async with served.client.get(url) as answer:
            numbers = [int(number or 0) async for _, number, _ in read_events(answer)]
        assert numbers[0] > last
        assert numbers == sorted(set(numbers))
