"""A TCP proxy that harms what passes through it, at byte counts drawn from a seed."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections import Counter
from enum import Enum
from typing import NamedTuple

__all__ = ["ENDING_KINDS", "Fault", "FaultKind", "Plan", "Proxy"]

CHUNK = 1 << 14


class FaultKind(Enum):
    """What can happen to a connection."""

    CUT = "cut"
    """Closed, as by a process that ends."""
    RESET = "reset"
    """Closed by RST: what was under way is lost."""
    HALF_CLOSE = "half-close"
    """The client sees the end; the server still sees a connection, and nobody who reads."""
    STALL = "stall"
    """Silent for a while, then cut."""
    PAUSE = "pause"
    """Silent for a while, then goes on."""
    THROTTLE = "throttle"
    """Slow from here on."""
    SPLIT = "split"
    """Byte by byte for a while."""


ENDING_KINDS = (FaultKind.CUT, FaultKind.RESET, FaultKind.HALF_CLOSE, FaultKind.STALL)
"""Those after which a client has to come back."""
MILD_KINDS = (FaultKind.PAUSE, FaultKind.THROTTLE, FaultKind.SPLIT)


class Fault(NamedTuple):
    """What happens to one connection, once it has carried ``after_bytes`` in one direction."""

    kind: FaultKind
    after_bytes: int
    of_request: bool
    """Counted, and struck, in what the client sends."""
    pause_s: float
    bytes_per_s: int


class Plan:
    """Draws a fault for each connection; ``quiet`` connections of ``period`` are left alone."""

    def __init__(self, seed: int, *, mean_bytes: int, quiet: float = 0.1) -> None:
        self._rng = random.Random(seed)
        self._mean_bytes = mean_bytes
        self._quiet = quiet

    def draw(self) -> Fault | None:
        """The next connection's fault."""
        rng = self._rng
        kind = rng.choice([*ENDING_KINDS] * 3 + [*MILD_KINDS])
        of_request = rng.random() < 0.1
        mean = 300 if of_request else self._mean_bytes
        fault = Fault(
            kind=kind,
            after_bytes=1 + int(rng.expovariate(1 / mean)),
            of_request=of_request,
            pause_s=rng.uniform(0.05, 0.5),
            bytes_per_s=rng.choice((20_000, 50_000, 200_000)),
        )
        return None if rng.random() < self._quiet else fault


class Proxy:
    """Listens on a port of its own in front of ``host:port``; ``struck`` counts its deeds."""

    def __init__(self, host: str, port: int, plan: Plan | None) -> None:
        self._target = (host, port)
        self._plan = plan
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.struck: Counter[FaultKind] = Counter()
        self.url = ""

    async def __aenter__(self) -> Proxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_all(self) -> int:
        """Reset every connection that is open now; returns how many."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        return len(tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            # Its end is this connection's matter, whatever it was.
            with contextlib.suppress(OSError, asyncio.CancelledError):
                await self._carry(reader, writer)
        finally:
            self._tasks.discard(task)
            writer.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self._plan.draw() if self._plan else None
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        try:
            for one in (writer, far_writer):
                sock = one.get_extra_info("socket")
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            there, back = (fault, None) if fault and fault.of_request else (None, fault)
            pumps = [
                asyncio.create_task(self._pump(reader, far_writer, there, writer)),
                asyncio.create_task(self._pump(far_reader, writer, back, far_writer)),
            ]
            try:
                await asyncio.gather(*pumps)
            except _Cut:
                pass
            finally:
                for pump in pumps:
                    pump.cancel()
                await asyncio.gather(*pumps, return_exceptions=True)
        finally:
            far_writer.transport.abort()

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        fault: Fault | None,
        other: asyncio.StreamWriter,
    ) -> None:
        """Carry one direction, and strike when the fault's count is reached."""
        carried = 0
        while data := await source.read(CHUNK):
            if fault is not None and carried + len(data) >= fault.after_bytes:
                head = fault.after_bytes - carried
                await _send(sink, data[:head])
                self.struck[fault.kind] += 1
                await _strike(fault, source, sink, other, data[head:])
                fault = None
            else:
                await _send(sink, data)
                carried += len(data)
        if sink.can_write_eof():
            sink.write_eof()


class _Cut(Exception):
    """The connection has ended, by our hand."""


async def _send(sink: asyncio.StreamWriter, data: bytes) -> None:
    if data:
        sink.write(data)
        await sink.drain()


async def _strike(
    fault: Fault,
    source: asyncio.StreamReader,
    sink: asyncio.StreamWriter,
    other: asyncio.StreamWriter,
    rest: bytes,
) -> None:
    match fault.kind:
        case FaultKind.CUT:
            sink.close()
            raise _Cut
        case FaultKind.RESET:
            for one in (sink, other):
                _reset(one)
            raise _Cut
        case FaultKind.HALF_CLOSE:
            sink.write_eof()
            # Nobody reads what the other side still sends, until the client has gone.
            await asyncio.sleep(fault.pause_s)
            raise _Cut
        case FaultKind.STALL:
            await asyncio.sleep(fault.pause_s)
            raise _Cut
        case FaultKind.PAUSE:
            await asyncio.sleep(fault.pause_s)
            await _send(sink, rest)
        case FaultKind.SPLIT:
            for at in range(len(rest)):
                await _send(sink, rest[at : at + 1])
                await asyncio.sleep(0)
        case FaultKind.THROTTLE:
            await _throttle(fault.bytes_per_s, source, sink, rest)


async def _throttle(
    bytes_per_s: int, source: asyncio.StreamReader, sink: asyncio.StreamWriter, rest: bytes
) -> None:
    step = max(1, bytes_per_s // 50)
    while rest:
        for at in range(0, len(rest), step):
            await _send(sink, rest[at : at + step])
            await asyncio.sleep(0.02)
        rest = await source.read(CHUNK)


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    if sock is not None:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
