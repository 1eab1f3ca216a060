"""One engine process and the server's end of its link."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Sequence

import msgspec

from engine.link import FrameError, FromEngine, ToEngine, encode_frame, pop_frames

__all__ = ["EngineProcess"]

log = logging.getLogger("millrace.engine")

_REAP_S = 5.0
"""How long a killed process may take to be gone; one stuck in a driver may stay for ever."""


class EngineProcess:
    """A running process; ``spawn`` starts one, ``end`` must be called in the end.

    Attributes:
        prepared: it has said that it imported everything and waits for its configuration.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.prepared = False
        self._process = process
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> EngineProcess:
        """Start ``command`` with the number of its end of a socket pair as last argument.

        Raises OSError when the system cannot.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            start = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    *command, str(theirs.fileno()), pass_fds=[theirs.fileno()]
                )
            )
            try:
                return cls(await asyncio.shield(start), reader, writer)
            except BaseException:
                writer.close()
                if not start.done() or start.exception() is None:  # cancelled: leave no child
                    process = await start
                    process.kill()
                    await process.wait()
                raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def exit_text(self) -> str:
        """How it ended."""
        code = self._process.returncode
        if code is None:
            return "it cannot be ended"
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def send(self, message: ToEngine) -> None:
        """Hand a message over without waiting; lost if the process is dead."""
        self._writer.write(encode_frame(message))

    async def read(self) -> list[FromEngine]:
        """Return the messages that have come, waiting for the first; none: there are no more.

        Raises FrameError on what is no message.
        """
        with contextlib.suppress(ConnectionError):
            while chunk := await self._reader.read(1 << 18):
                self._buffer += chunk
                if bodies := pop_frames(self._buffer):
                    try:
                        return [self._decoder.decode(body) for body in bodies]
                    except msgspec.MsgspecError as error:
                        raise FrameError(f"a frame that is no message: {error}") from error
        return []

    def kill(self) -> None:
        """SIGKILL it, which also ends a stopped one; ``read`` still returns what it had sent."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def hang_up(self) -> None:
        """Read nothing more, whatever the process still holds open."""
        self._writer.transport.abort()

    async def end(self, patience_s: float) -> None:
        """Close our end, which asks the process to stop, and kill it if it does not."""
        self._writer.close()
        try:
            async with asyncio.timeout(patience_s):
                await self._process.wait()
        except TimeoutError:
            log.warning("engine process %d does not stop; killing it", self.pid)
        except asyncio.CancelledError:
            await self._kill_and_wait()  # a process that nobody waits for is left behind
            raise
        else:
            return
        await self._kill_and_wait()

    async def _kill_and_wait(self) -> None:
        self.kill()
        try:
            async with asyncio.timeout(_REAP_S):
                await self._process.wait()
        except TimeoutError:
            log.critical("engine process %d cannot be killed; leaving it behind", self.pid)
