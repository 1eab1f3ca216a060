"""Where engines come from: a process that has imported everything and forks them.

It forks a spare of itself, too, which takes its place when it dies: the next engine need not wait
for another import.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import msgspec

from engine.errors import EngineDied
from engine.link import (
    FORK_ENGINE,
    FORK_ZYGOTE,
    Ended,
    Failed,
    Forked,
    FrameError,
    FromZygote,
    Loading,
    Prepared,
    pop_frames,
)
from engine.process import EngineProcess, ForkedProcess, exit_text_of

__all__ = ["Nursery", "ZygoteProcess"]

log = logging.getLogger("millrace.engine")

_STOP_S = 6.0
"""How long a zygote may take to end: longer than it waits for the engines it forked."""
_TELL_S = 0.5
"""How long a zygote that hung up may take to end, for us to say how it did."""
_SPARE_PAUSE_S = 1.0
"""Between two tries to have a spare zygote."""
_GONE = "the process that engines are forked from is gone"

OnMessage = Callable[[Loading | Prepared], None]
Born = TypeVar("Born", bound=ForkedProcess)


class ZygoteProcess:
    """A running process that forks engines; ``end`` must be called in the end.

    Attributes:
        prepared: it has said that it imported everything.
        lost: set when it is gone or of no use any more.
    """

    def __init__(
        self,
        process: asyncio.subprocess.Process | ForkedProcess,
        control: socket.socket,
        on_message: OnMessage,
        *,
        prepared: bool = False,
    ) -> None:
        control.setblocking(False)
        self.prepared = prepared
        self.lost = asyncio.Event()
        self._process = process
        self._control = control
        self._on_message = on_message
        self._buffer = bytearray()
        self._fds: deque[int] = deque()
        self._decoder = msgspec.msgpack.Decoder(FromZygote)
        self._one_at_a_time = asyncio.Lock()
        self._forking: asyncio.Future[ForkedProcess] | None = None
        self._birth: Callable[[int, int], ForkedProcess]
        """Makes an object of the process that is being forked, of its id and descriptor."""
        self._children: dict[int, ForkedProcess] = {}
        self._orphans: list[ForkedProcess] = []
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
        """Have an engine process forked. Raises EngineDied when that fails."""
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            try:
                return await self._fork(
                    FORK_ENGINE, theirs, lambda pid, fd: EngineProcess(pid, fd, reader, writer)
                )
            except BaseException:
                writer.close()
                raise

    async def fork_spare(self) -> ZygoteProcess:
        """Have another such process forked. Raises EngineDied when that fails."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                process = await self._fork(FORK_ZYGOTE, theirs, ForkedProcess)
            except BaseException:
                ours.close()
                raise
        return ZygoteProcess(process, ours, self._on_message, prepared=True)

    async def _fork(
        self, what: bytes, sock: socket.socket, birth: Callable[[int, int], Born]
    ) -> Born:
        async with self._one_at_a_time:
            if self.lost.is_set():
                raise EngineDied(_GONE)
            self._birth = birth
            self._forking = forking = asyncio.get_running_loop().create_future()
            try:
                with contextlib.suppress(OSError):  # then it is gone, which is noticed as ever
                    socket.send_fds(self._control, [what], [sock.fileno()])
                return cast(Born, await forking)
            except EngineDied:
                if self.lost.is_set():
                    raise EngineDied(f"{_GONE} ({await self._exit_text()})") from None
                raise
            except BaseException:
                if forking.done() and not forking.cancelled() and forking.exception() is None:
                    await forking.result().kill_and_wait()  # cancelled in the moment of its birth
                raise
            finally:
                self._forking = None

    def kill(self) -> None:
        """SIGKILL it; what it forked lives on."""
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
        self._orphans += self._children.values()
        self._children.clear()
        for child in self._orphans:
            child.told(None)

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
        while self._orphans:
            self._orphans.pop().adopt()

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
                    child = self._children[pid] = self._birth(pid, pid_fd)
                    self._forking.set_result(child)
                else:  # nobody waits for it any more, and its socket is closed: it will end
                    os.close(pid_fd)
            case Ended(pid, exit_code):
                if pid in self._children:
                    self._children.pop(pid).told(exit_code)
            case Failed(_, text):
                if self._forking is not None and not self._forking.done():
                    self._forking.set_exception(EngineDied(text))
            case Loading() | Prepared():
                self.prepared = self.prepared or isinstance(message, Prepared)
                self._on_message(message)


class Nursery:
    """Keeps a zygote and a spare one: when it ends, the spare takes its place, or a new one does.

    Args:
        command: what to start, with the number of its end of a socket pair as last argument.
        on_message: called with what a zygote says of its own start.
    """

    def __init__(self, command: Sequence[str], on_message: OnMessage) -> None:
        self._command = command
        self._on_message = on_message
        self._zygote: ZygoteProcess | None = None
        self._spare: ZygoteProcess | None = None
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
                await self._end_keeper()
                await self._end_zygote()
                zygote = await self._take_spare()
                if zygote is None:
                    _inherit_orphans()
                    zygote = await ZygoteProcess.spawn(self._command, self._on_message)
                self._zygote = zygote
                self._keeper = asyncio.create_task(self._keep(zygote), name="zygote-keeper")
            return zygote

    async def close(self) -> None:
        """End all of it."""
        async with self._starting:
            await self._end_keeper()
            spare, self._spare = self._spare, None
            if spare is not None:
                spare.hang_up()  # the zygote waits for its end
            await self._end_zygote()
            if spare is not None:
                await spare.end()

    async def _end_keeper(self) -> None:
        keeper, self._keeper = self._keeper, None
        if keeper is not None and keeper is not asyncio.current_task():
            keeper.cancel()
            await asyncio.wait([keeper])

    async def _end_zygote(self) -> None:
        zygote, self._zygote = self._zygote, None
        if zygote is not None:
            await zygote.end()

    async def _take_spare(self) -> ZygoteProcess | None:
        spare, self._spare = self._spare, None
        if spare is not None and spare.lost.is_set():
            await spare.end()
            return None
        return spare

    async def _keep(self, zygote: ZygoteProcess) -> None:
        while not zygote.lost.is_set():
            await self._keep_spare(zygote)
        if not zygote.prepared:
            return  # another would come no further; whoever wants an engine will see
        log.warning("process %d, which forks engines, is gone; going on with another", zygote.pid)
        try:
            await self.start()
        except OSError as error:
            log.warning("no process that forks engines can be started: %s", error)

    async def _keep_spare(self, zygote: ZygoteProcess) -> None:
        """Have a spare until it is lost, or the zygote is."""
        try:
            self._spare = spare = await zygote.fork_spare()
        except EngineDied as error:
            if not zygote.lost.is_set():
                log.warning("there is nothing to take over from process %d: %s", zygote.pid, error)
        else:
            await _first(zygote.lost, spare.lost)
            if not spare.lost.is_set():
                return
            self._spare = None
            await spare.end()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SPARE_PAUSE_S):
                await zygote.lost.wait()


def _inherit_orphans() -> None:
    """Have what a zygote leaves behind become this process's children, not those of init.

    In a container init is often no more than a program that never reaps them (prctl(2),
    PR_SET_CHILD_SUBREAPER).
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


async def _first(*events: asyncio.Event) -> None:
    """Wait until one of the events has come."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for one in waiting:
            one.cancel()
