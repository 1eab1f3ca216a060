"""Throw mutated inputs at a real server, and look at what is left of it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil

from tests.e2e.live import LiveServer
from tests.fuzz.frames import HANDSHAKE, frame, mutated_frames
from tests.fuzz.mutations import mutated_request

__all__ = ["KEYS", "Answered", "Outcome", "exchange", "fuzz", "serve_fuzzed", "throw_frames"]

KEYS = ("key-of-the-first", "key-of-the-second")
PARALLEL = 16
ANSWER_S = 30.0
"""An input without an end of the connection after so long is a hang."""
SILENCE_S = 1.5
GROWTH = 0.05
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")

OPTIONS = ("--kv-memory", "32MiB", "--max-model-len", "256", "--log-level", "warning")
"""Short contexts, so that a mutation that lifts a limit does not cost a minute."""


def serve_fuzzed(directory: Path) -> LiveServer:
    """Start a server that knows two keys."""
    keys = directory / "keys"
    keys.write_text("\n".join(KEYS) + "\n")
    keys.chmod(0o600)
    return LiveServer([*OPTIONS, "--api-key-file", str(keys)])


class Answered(NamedTuple):
    """What came back until the connection's end."""

    data: bytes
    hung: bool

    @property
    def statuses(self) -> list[int]:
        """The status of every HTTP answer in it."""
        return [int(one) for one in STATUS.findall(self.data)]


@dataclasses.dataclass
class Outcome:
    """Sums over many inputs; ``bad`` describes what must not be."""

    sent: int = 0
    statuses: Counter[int] = dataclasses.field(default_factory=Counter)
    kinds: Counter[str] = dataclasses.field(default_factory=Counter)
    bad: list[str] = dataclasses.field(default_factory=list)
    growth: float = 0.0
    """Of the server's memory, after the first fifth of the inputs."""


async def exchange(
    server: LiveServer, data: bytes, *, then: bytes = b"", upgraded: bool = False
) -> Answered:
    """Send bytes, then ``then`` once the head of an answer is there, and read to the end.

    Our side is closed after sending, at once (``upgraded``) or after a silence: an answer may take
    a while, and a server that waits for more of a request has to know that this is all there is.
    """
    address = urlsplit(server.url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    got = bytearray()
    try:
        async with asyncio.timeout(ANSWER_S):
            # The server may refuse, and close, before it has all; to shut down our side of what is
            # closed is no ConnectionError, but an OSError.
            with contextlib.suppress(OSError):
                writer.write(data)
                await writer.drain()
                if upgraded:
                    with contextlib.suppress(asyncio.IncompleteReadError):
                        got += await reader.readuntil(b"\r\n\r\n")
                    writer.write(then)
                    await writer.drain()
                    writer.write_eof()
                while part := await _read(reader, writer):
                    got += part
    except TimeoutError:
        return Answered(bytes(got), hung=True)
    finally:
        writer.transport.abort()
    return Answered(bytes(got), hung=False)


async def _read(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    """Read; after a silence, say that there is no more to come, and read on."""
    try:
        async with asyncio.timeout(SILENCE_S):
            return await reader.read(1 << 16)
    except TimeoutError:
        if writer.can_write_eof():
            writer.write_eof()
        return await reader.read(1 << 16)


async def throw_request(server: LiveServer, rng: random.Random) -> tuple[str, Answered]:
    """Send one mutated request."""
    about, data = mutated_request(rng, KEYS[0])
    return about, await exchange(server, data)


async def throw_frames(server: LiveServer, rng: random.Random) -> tuple[str, Answered]:
    """Open a WebSocket and send what mutated frames there are."""
    about, data = mutated_frames(rng)
    head = (HANDSHAKE.format(key=KEYS[0]) + "\r\n").encode()
    return about, await exchange(server, head, then=data + frame(b"x", opcode=9), upgraded=True)


Throw = Callable[[LiveServer, random.Random], Awaitable[tuple[str, Answered]]]


async def fuzz(server: LiveServer, throw: Throw, *, seed: int, count: int) -> Outcome:
    """Throw ``count`` inputs and return what came of it, the server's health included."""
    outcome = Outcome()
    log_from = len(server.log)
    rng = random.Random(seed)
    limit = asyncio.Semaphore(PARALLEL)

    async def one(own: random.Random) -> None:
        async with limit:
            about, answered = await throw(server, own)
        outcome.sent += 1
        outcome.kinds[about.partition(" ")[0]] += 1
        outcome.statuses.update(answered.statuses)
        if any(status >= 500 for status in answered.statuses):
            outcome.bad.append(f"{answered.statuses} to {about}: {answered.data[-300:]!r}")
        if answered.hung:
            outcome.bad.append(f"no end after {ANSWER_S:.0f} s: {about}")

    # What a process grows to until it has seen everything is no leak: the second half counts.
    first = count // 2
    await asyncio.gather(*(one(random.Random(rng.random())) for _ in range(first)))
    await asyncio.to_thread(server.idle_metrics)
    before = _rss_bytes(server)
    await asyncio.gather(*(one(random.Random(rng.random())) for _ in range(count - first)))
    await asyncio.to_thread(_look, server, log_from, outcome)
    outcome.growth = _rss_bytes(server) / before - 1
    return outcome


def _rss_bytes(server: LiveServer) -> int:
    return int(psutil.Process(server.pid).memory_info().rss)


def _look(server: LiveServer, log_from: int, outcome: Outcome) -> None:
    try:
        server.assert_clean(log_from)
    except AssertionError as error:
        outcome.bad.append(str(error)[-3000:])
    kinds = psutil.Process(server.pid).net_connections(kind="tcp")
    port = urlsplit(server.url).port
    left = sum(
        one.status in ("ESTABLISHED", "CLOSE_WAIT") and one.laddr.port == port for one in kinds
    )
    if left > PARALLEL:
        outcome.bad.append(f"{left} sockets are open")
