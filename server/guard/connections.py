"""Bounds of connections: how many, how slowly a head may come, how much may lie unread.

aiohttp bounds lines, header fields and bodies; what it leaves open is here. A connection that stays
beyond a bound is cut: readers of a stream know the last id that they got and resume after it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from socket import SO_SNDBUF, SOL_SOCKET, socket

from aiohttp import web

from server.metering.metrics import Metrics

__all__ = ["ConnectionLimits", "Connections"]

UNREAD_S = 30.0
"""How long a reader may stay beyond its bytes before it is cut."""
_FULL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nConnection: close\r\n"
    b"Content-Length: 0\r\n\r\n"
)
_TOO_MANY = _FULL.replace(b"503 Service Unavailable", b"429 Too Many Requests")


class ConnectionLimits:
    """What ``ServerSettings`` say of connections."""

    def __init__(
        self,
        *,
        max_all: int,
        max_per_address: int,
        head_timeout_s: float,
        max_unsent_bytes: int,
        unread_s: float = UNREAD_S,
    ) -> None:
        self.max_all = max_all
        self.max_per_address = max_per_address
        self.head_timeout_s = head_timeout_s
        self.max_unsent_bytes = max_unsent_bytes
        self.unread_s = unread_s


class Connections:
    """All open connections of one server."""

    def __init__(self, limits: ConnectionLimits, metrics: Metrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self._by_handler: dict[object, _Guarded] = {}
        self._addresses: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._by_handler)

    async def listen(
        self, runner: web.AppRunner, sockets: Iterable[socket]
    ) -> list[asyncio.Server]:
        """Serve on bound sockets, each connection within the limits."""
        loop = asyncio.get_running_loop()
        handlers = runner.server
        assert handlers is not None
        return [
            await loop.create_server(lambda: _Guarded(handlers(), self), sock=one)
            for one in sockets
        ]

    def request_begins(self, handler: object) -> None:
        """A whole head has come on the connection that ``handler`` serves."""
        if (connection := self._by_handler.get(handler)) is not None:
            connection.request_begins()

    def request_ends(self, handler: object) -> None:
        """Its answer is out; the connection may be used again."""
        if (connection := self._by_handler.get(handler)) is not None:
            connection.request_ends()

    def refusal(self, address: str) -> bytes | None:
        """Return what to tell a new connection for which there is no room."""
        if len(self._by_handler) >= self.limits.max_all:
            self.metrics.connection_refused("all")
            return _FULL
        if self._addresses[address] >= self.limits.max_per_address:
            self.metrics.connection_refused("address")
            return _TOO_MANY
        return None

    def add(self, handler: object, connection: _Guarded, address: str) -> None:
        """Count a connection."""
        self._by_handler[handler] = connection
        self._addresses[address] += 1
        self.metrics.connections(len(self._by_handler))

    def remove(self, handler: object, address: str) -> None:
        """It is closed."""
        del self._by_handler[handler]
        self._addresses[address] -= 1
        if not self._addresses[address]:
            del self._addresses[address]
        self.metrics.connections(len(self._by_handler))


class _Guarded(asyncio.Protocol):
    """Stands between a transport and aiohttp's handler of it."""

    def __init__(self, handler: asyncio.Protocol, connections: Connections) -> None:
        self._handler = handler
        self._connections = connections
        self._limits = connections.limits
        self._transport: asyncio.Transport | None = None
        self._address = ""
        self._counted = False
        self._busy = False
        self._head_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        peer = transport.get_extra_info("peername")
        self._address = str(peer[0]) if isinstance(peer, tuple) else ""
        self._transport = transport
        if (refusal := self._connections.refusal(self._address)) is not None:
            transport.write(refusal)
            transport.close()
            return
        self._counted = True
        self._connections.add(self._handler, self, self._address)
        transport.set_write_buffer_limits(high=self._limits.max_unsent_bytes)
        if (sock := transport.get_extra_info("socket")) is not None:
            # Otherwise the kernel lets each stalled reader have megabytes.
            sock.setsockopt(SOL_SOCKET, SO_SNDBUF, self._limits.max_unsent_bytes)
        self._head_timer = self._cut_after(self._limits.head_timeout_s, "slow_head")
        self._handler.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        if self._counted:
            self._connections.remove(self._handler, self._address)
            self._handler.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if not self._counted:
            return
        if not self._busy and self._head_timer is None:
            self._head_timer = self._cut_after(self._limits.head_timeout_s, "slow_head")
        self._handler.data_received(data)

    def eof_received(self) -> bool | None:
        return self._handler.eof_received() if self._counted else None

    def pause_writing(self) -> None:
        self._handler.pause_writing()
        self._unread_timer = self._cut_after(self._limits.unread_s, "slow_reader")

    def resume_writing(self) -> None:
        if self._unread_timer is not None:
            self._unread_timer.cancel()
            self._unread_timer = None
        self._handler.resume_writing()

    def request_begins(self) -> None:
        """The head is complete."""
        self._busy = True
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def request_ends(self) -> None:
        """The connection waits for another head, without a limit of ours until it begins."""
        self._busy = False

    def _cut_after(self, seconds: float, reason: str) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(seconds, self._cut, reason)

    def _cut(self, reason: str) -> None:
        if self._transport is not None:
            self._connections.metrics.connection_cut(reason)
            self._transport.abort()
