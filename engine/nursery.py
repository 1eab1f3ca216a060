"""Where engines come from: a process that has imported everything and forks them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from engine.errors import EngineDied
from engine.link import (
    Ended,
    Failed,
    Forked,
    FrameError,
    FromZygote,
    Loading,
    Prepared,
    pop_frames,
)
from engine.process import EngineProcess, exit_text_of

__all__ = ["Nursery", "ZygoteProcess"]

log = logging.getLogger("millrace.engine")

_STOP_S = 6.0
"""How long a zygote may take to end: longer than it waits for the engines it forked."""
_TELL_S = 0.5
"""How long a zygote that hung up may take to end, for us to say how it did."""
_GONE = "the process that engines are forked from is gone"

OnMessage = Callable[[Loading | Prepared], None]


class ZygoteProcess:
    """A running process that forks engines; ``end`` must be called in the end.

    Attributes:
        prepared: it has said that it imported everything.
        lost: set when it is gone or of no use any more.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        control: socket.socket,
        on_message: OnMessage,
    ) -> None:
        control.setblocking(False)
        self.prepared = False
        self.lost = asyncio.Event()
        self._process = process
        self._control = control
        self._on_message = on_message
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._decoder = msgspec.msgpack.Decoder(FromZygote)
        self._forking: asyncio.Future[EngineProcess] | None = None
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter]
        """Our ends of the link of the engine that is being forked."""
        self._engines: dict[int, EngineProcess] = {}
        asyncio.get_running_loop().add_reader(control, self._on_readable)

    @classmethod
    async def spawn(cls, command: Sequence[str], on_message: OnMessage) -> ZygoteProcess:
        """Start ``command`` with the number of its end of a socket pair as last argument.

        Raises OSError when the system cannot.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            start = asyncio.ensure_future(
                asyncio.create_subprocess_exec(
                    *command, str(theirs.fileno()), pass_fds=[theirs.fileno()]
                )
            )
            try:
                return cls(await asyncio.shield(start), ours, on_message)
            except BaseException:
                ours.close()
                if not start.done() or start.exception() is None:  # cancelled: leave no child
                    process = await start
                    process.kill()
                    await process.wait()
                raise

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def fork(self) -> EngineProcess:
        """Have an engine process forked, one at a time. Raises EngineDied when that fails."""
        if self.lost.is_set():
            raise EngineDied(_GONE)
        ours, theirs = socket.socketpair()
        with theirs:
            self._ends = await asyncio.open_connection(sock=ours)
            forking: asyncio.Future[EngineProcess] = asyncio.get_running_loop().create_future()
            self._forking = forking
            try:
                with contextlib.suppress(OSError):  # then it is gone, which is noticed as ever
                    socket.send_fds(self._control, [b"\0"], [theirs.fileno()])
                return await forking
            except EngineDied:
                self._ends[1].close()
                if self.lost.is_set():
                    raise EngineDied(f"{_GONE} ({await self._exit_text()})") from None
                raise
            except BaseException:
                self._ends[1].close()
                if forking.done() and not forking.cancelled() and forking.exception() is None:
                    await forking.result().end(0.0)  # cancelled in the moment of its birth
                raise
            finally:
                self._forking = None

    def kill(self) -> None:
        """SIGKILL it; the engines that it forked live on."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def hang_up(self) -> None:
        """Listen to it no more."""
        if not self.lost.is_set():
            asyncio.get_running_loop().remove_reader(self._control)
            self._control.close()
            self.lost.set()
        while self._fds:
            os.close(self._fds.popleft())
        if self._forking is not None and not self._forking.done():
            self._forking.set_exception(EngineDied(_GONE))
        for engine in self._engines.values():
            engine.told(None)
        self._engines.clear()

    async def end(self) -> None:
        """Close our end, which asks it to stop, and kill it if it does not."""
        self.hang_up()
        try:
            async with asyncio.timeout(_STOP_S):
                await self._process.wait()
        except TimeoutError:
            log.warning("the process %d that forks engines does not stop; killing it", self.pid)
            self.kill()
            await self._process.wait()

    async def _exit_text(self) -> str:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TELL_S):
                await self._process.wait()
        return exit_text_of(self._process.returncode)

    def _on_readable(self) -> None:
        try:
            data, fds, _, _ = socket.recv_fds(
                self._control, 1 << 16, 8, flags=socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        self._fds += fds
        self._buffer += data
        try:
            for body in pop_frames(self._buffer):
                self._handle(self._decoder.decode(body))
        except (FrameError, msgspec.MsgspecError) as error:
            log.error("the process %d that forks engines: %s", self.pid, error)
            self.kill()
            data = b""
        if not data:
            self.hang_up()

    def _handle(self, message: FromZygote) -> None:
        match message:
            case Forked(pid):
                pid_fd = self._fds.popleft()
                if self._forking is not None and not self._forking.done():
                    engine = self._engines[pid] = EngineProcess(pid, pid_fd, *self._ends)
                    self._forking.set_result(engine)
                else:  # nobody waits for it any more, and its link is closed: it will end
                    os.close(pid_fd)
            case Ended(pid, exit_code):
                if pid in self._engines:
                    self._engines.pop(pid).told(exit_code)
            case Failed(_, text):
                if self._forking is not None and not self._forking.done():
                    self._forking.set_exception(EngineDied(text))
            case Loading() | Prepared():
                self.prepared = self.prepared or isinstance(message, Prepared)
                self._on_message(message)


class Nursery:
    """Keeps a zygote: when it ends, another one is started.

    Args:
        command: what to start, with the number of its end of a socket pair as last argument.
        on_message: called with what a zygote says of its own start.
    """

    def __init__(self, command: Sequence[str], on_message: OnMessage) -> None:
        self._command = command
        self._on_message = on_message
        self._zygote: ZygoteProcess | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()

    @property
    def zygote(self) -> ZygoteProcess | None:
        """The living one, which may still be importing."""
        zygote = self._zygote
        return None if zygote is None or zygote.lost.is_set() else zygote

    async def start(self) -> ZygoteProcess:
        """Return the living zygote, which is started if there is none. Raises OSError."""
        async with self._starting:
            zygote = self.zygote
            if zygote is None:
                await self._end()
                self._zygote = zygote = await ZygoteProcess.spawn(self._command, self._on_message)
                self._keeper = asyncio.create_task(self._keep(zygote), name="zygote-keeper")
            return zygote

    async def close(self) -> None:
        """End it."""
        async with self._starting:
            await self._end()

    async def _end(self) -> None:
        zygote, self._zygote = self._zygote, None
        keeper, self._keeper = self._keeper, None
        if keeper is not None and keeper is not asyncio.current_task():
            keeper.cancel()
            await asyncio.wait([keeper])
        if zygote is not None:
            await zygote.end()

    async def _keep(self, zygote: ZygoteProcess) -> None:
        await zygote.lost.wait()
        if not zygote.prepared:
            return  # another would come no further; whoever wants an engine will see
        log.warning("process %d, which forks engines, is gone; starting another", zygote.pid)
        try:
            await self.start()
        except OSError as error:
            log.warning("no process that forks engines can be started: %s", error)
