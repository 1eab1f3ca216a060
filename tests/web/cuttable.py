"""A TCP relay in front of a server, whose connections a test can cut or let hang."""

from __future__ import annotations

import asyncio
import contextlib

__all__ = ["Relay"]

CHUNK_BYTES = 65536


class Relay:
    """Passes connections to ``127.0.0.1:target_port`` on. All methods run in one event loop."""

    def __init__(self, target_port: int) -> None:
        self.port = 0
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        self._flows: set[asyncio.Event] = set()
        self._hangs = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> None:
        """Take connections; a second time on the port of the first."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        """Cut all connections; new ones are taken."""
        for writer in self._open:
            writer.transport.abort()
        for flow in self._flows:
            flow.set()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def close(self) -> None:
        """Cut all connections and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self.cut()

    def freeze(self) -> None:
        """Carry nothing more on the connections that are open now, and close none of them."""
        for flow in self._flows:
            flow.clear()

    def hang(self, hangs: bool) -> None:
        """Whether connections to come are taken and then carry nothing."""
        self._hangs = hangs

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writers = [writer]
        flow = asyncio.Event()
        if not self._hangs:
            flow.set()
        self._flows.add(flow)
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self._target_port)
            writers.append(back)
            self._open.update(writers)
            await asyncio.gather(_pump(reader, back, flow), _pump(there, writer, flow))
        except OSError:
            pass
        finally:
            self._open.difference_update(writers)
            self._flows.discard(flow)
            for one in writers:
                one.transport.abort()
            self._tasks.discard(task)


async def _pump(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flow: asyncio.Event
) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK_BYTES):
            await flow.wait()
            writer.write(data)
            await writer.drain()
    # Whoever ended ends the other side too; half-open connections are of no use here.
    writer.transport.abort() if reader.exception() else writer.close()
