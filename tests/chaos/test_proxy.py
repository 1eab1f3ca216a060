"""Each fault of the proxy is what it says: seen from both ends of a real connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.chaos.proxy import ENDING_KINDS, Fault, FaultKind, Plan, Proxy

DATA = bytes(range(256)) * 400


class Fixed(Plan):
    """Always the same fault."""

    def __init__(self, fault: Fault | None) -> None:
        super().__init__(0, mean_bytes=1)
        self._fault = fault

    def draw(self) -> Fault | None:
        return self._fault


def make_fault(kind: FaultKind, *, after: int = 5000, of_request: bool = False) -> Fault:
    return Fault(kind, after, of_request, pause_s=0.01, bytes_per_s=10_000_000)


class Echo:
    """Sends DATA to whoever says hello, and keeps what it got."""

    def __init__(self) -> None:
        self.got = b""
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            self.got = await reader.read(1 << 16)
            writer.write(DATA)
            await writer.drain()
            writer.write_eof()
            self.got += await reader.read()
        except OSError:
            pass
        finally:
            writer.transport.abort()
            self.left.set()


@asynccontextmanager
async def behind(fault: Fault | None) -> AsyncIterator[tuple[Proxy, Echo]]:
    echo = Echo()
    server = await asyncio.start_server(echo.serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    try:
        async with Proxy("127.0.0.1", port, Fixed(fault)) as proxy:
            yield proxy, echo
    finally:
        server.close()


async def ask(proxy: Proxy, message: bytes = b"hello") -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(proxy.url.rsplit(":", 1)[1]))
    try:
        writer.write(message)
        got = b""
        while part := await reader.read(1 << 16):
            got += part
        return got
    finally:
        writer.transport.abort()


@pytest.mark.parametrize(
    "fault",
    [
        None,
        make_fault(FaultKind.SPLIT, after=100_000),
        make_fault(FaultKind.PAUSE),
        make_fault(FaultKind.THROTTLE),
    ],
)
async def test_mild_faults_lose_nothing(fault: Fault | None) -> None:
    async with behind(fault) as (proxy, echo):
        assert await ask(proxy) == DATA
        assert echo.got == b"hello"
        assert sum(proxy.struck.values()) == (fault is not None)


@pytest.mark.parametrize("kind", [FaultKind.CUT, FaultKind.HALF_CLOSE, FaultKind.STALL])
async def test_a_cut_falls_at_its_byte(kind: FaultKind) -> None:
    async with behind(make_fault(kind)) as (proxy, echo):
        try:
            got = await ask(proxy)
            assert got == DATA[:5000]
        except ConnectionResetError:
            assert kind is FaultKind.STALL
        await echo.left.wait()
        assert proxy.struck == {kind: 1}


async def test_a_reset_is_a_reset() -> None:
    async with behind(make_fault(FaultKind.RESET)) as (proxy, echo):
        with pytest.raises(ConnectionResetError):
            await ask(proxy)
        await echo.left.wait()
        assert proxy.struck == {FaultKind.RESET: 1}


async def test_a_request_can_be_cut() -> None:
    async with behind(make_fault(FaultKind.CUT, after=3, of_request=True)) as (proxy, echo):
        await ask(proxy)
        await echo.left.wait()
        assert b"hel".startswith(echo.got)


async def test_what_ends_early_is_not_struck() -> None:
    async with behind(make_fault(FaultKind.CUT, after=len(DATA) + 1)) as (proxy, _):
        assert await ask(proxy) == DATA
        assert not proxy.struck


def test_a_plan_is_its_seed() -> None:
    one, same, other = (Plan(seed, mean_bytes=3000) for seed in (1, 1, 2))
    first = [one.draw() for _ in range(200)]
    assert first == [same.draw() for _ in range(200)]
    assert first != [other.draw() for _ in range(200)]
    kinds = {fault.kind for fault in first if fault is not None}
    assert kinds == set(FaultKind)
    assert set(ENDING_KINDS) < kinds
