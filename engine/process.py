"""Processes that a zygote forked, and the server's end of an engine's link."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal

import msgspec

from engine.link import FrameError, FromEngine, ToEngine, encode_frame, pop_frames

__all__ = ["EngineProcess", "ForkedProcess", "exit_text_of"]

log = logging.getLogger("millrace.engine")

_REAP_S = 5.0
"""How long a killed process may take to be gone; one stuck in a driver may stay for ever."""
_TELL_S = 0.5
"""How long after an engine's end its zygote may take to say how it ended."""


class ForkedProcess:
    """A process that was forked for us, by a zygote; it must be seen to its end.

    Args:
        pid: its process id.
        pid_fd: descriptor of the process (pidfd), which becomes this object's.

    Attributes:
        returncode: how it ended, as ``subprocess`` says it; None: not yet, or nobody knows.
    """

    def __init__(self, pid: int, pid_fd: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._pid_fd = pid_fd
        self._is_open = True
        self._is_orphan = False
        self._gone = asyncio.Event()
        self._told = asyncio.Event()
        asyncio.get_running_loop().add_reader(pid_fd, self._on_end)

    def kill(self) -> None:
        """SIGKILL it, which also ends a stopped one."""
        if not self._gone.is_set():
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pid_fd, signal.SIGKILL)

    async def wait(self) -> None:
        """Wait until it is gone."""
        await self._gone.wait()

    async def kill_and_wait(self) -> None:
        """Kill it and see it gone, unless it cannot be."""
        self.kill()
        try:
            async with asyncio.timeout(_REAP_S):
                await self._gone.wait()
        except TimeoutError:
            log.critical("process %d cannot be killed; leaving it behind", self.pid)

    def told(self, exit_code: int | None) -> None:
        """Enter how it ended, as its zygote says, which has reaped it; None: nobody knows."""
        self.returncode = exit_code
        self._told.set()
        self._release()

    def adopt(self) -> None:
        """Its zygote is no more, and this process has inherited it: reap it, now or at its end."""
        self._is_orphan = True
        self._release()

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pid_fd)
        self._gone.set()
        self._release()

    def _release(self) -> None:
        # Until it is reaped, by whomever, the descriptor is what names it for certain.
        if not self._is_open or not self._gone.is_set():
            return
        if self._is_orphan:
            with contextlib.suppress(ChildProcessError):  # its zygote came to that in the end
                os.waitid(os.P_PIDFD, self._pid_fd, os.WEXITED | os.WNOHANG)
        elif self.returncode is None:
            return
        os.close(self._pid_fd)
        self._is_open = False


class EngineProcess(ForkedProcess):
    """An engine and the server's end of its link; ``end`` must be called in the end."""

    def __init__(
        self, pid: int, pid_fd: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        super().__init__(pid, pid_fd)
        self._reader = reader
        self._writer = writer
        self._buffer = bytearray()
        self._decoder = msgspec.msgpack.Decoder(FromEngine)

    @property
    def exit_text(self) -> str:
        """How it ended."""
        if not self._gone.is_set():
            return "it cannot be ended"
        return exit_text_of(self.returncode)

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

    def hang_up(self) -> None:
        """Read nothing more, whatever the process still holds open."""
        self._writer.transport.abort()

    async def end(self, patience_s: float) -> None:
        """Close our end, which asks the process to stop, and kill it if it does not."""
        self._writer.close()
        try:
            async with asyncio.timeout(patience_s):
                await self._gone.wait()
        except TimeoutError:
            log.warning("engine process %d does not stop; killing it", self.pid)
            await self.kill_and_wait()
        except asyncio.CancelledError:
            await self.kill_and_wait()  # a process that nobody waits for is left behind
            raise
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                await self._told.wait()


def exit_text_of(exit_code: int | None) -> str:
    """Say how a process ended; None: nobody knows."""
    if exit_code is None:
        return "nobody saw how"
    return f"signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}"
