"""The process that engines are forked from: it has imported everything and does nothing else.

Importing takes a second, forking a few milliseconds: so however fast engines die, the next one is a
fork away. A fork takes one thread along and leaves locks as they are, so this process has only one,
never computes anything and never touches a GPU. It may itself be forked: such a spare takes its
place when it dies.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

from engine.link import (
    FORK_ENGINE,
    Ended,
    Failed,
    Forked,
    FromZygote,
    Prepared,
    encode_frame,
)

__all__ = ["NAME", "Zygote", "tell_system"]

_GRACE_S = 5.0
"""Engines see as their zygote does that the server is gone, and end after their step; one that is
stuck is killed after so long."""


NAME, _SPARE_NAME = "millrace-zygote", "millrace-spare"


def tell_system(name: str, value: str) -> None:
    """Write a file of this process's in /proc, where there is one."""
    with contextlib.suppress(OSError):
        Path("/proc/self", name).write_text(value)


class Zygote:
    """Forks an engine, or a spare of itself, for each socket that comes.

    Args:
        control: this process's end of a socket pair. Each message is one byte, what to fork, with
            a descriptor: an engine's end of its link, or a spare's of such a socket pair. The
            answer is ``Forked`` with a descriptor of the new process, or ``Failed``. Closing the
            other end asks for this process's end.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int] = {}
        """Descriptor of a forked process to its process id."""
        self._is_spare = False

    def say(self, message: FromZygote, fds: tuple[int, ...] = ()) -> None:
        """Send a frame. Waits: the server reads at once what few words there are."""
        frame = encode_frame(message)
        with contextlib.suppress(OSError):  # the server is gone; waiting for its word will tell
            sent = socket.send_fds(self._control, [frame], list(fds))
            self._control.sendall(frame[sent:])

    def serve(self, prepare: Callable[[], object]) -> socket.socket | None:
        """Prepare, then fork until the server is gone.

        Returns in every engine, with its link's socket, and in the end here and in every spare,
        with None.
        """
        # Or else numpy, which torch imports, starts threads for products nobody asks of it.
        os.environ["OPENBLAS_NUM_THREADS"] = "1"
        prepare()
        # A collector that goes over the shared objects would copy their pages.
        gc.collect()
        gc.freeze()
        self.say(Prepared())
        while True:
            control = self._control.fileno()
            readable, _, _ = select.select([control, *self._children], [], [])
            for fd in self._children.keys() & set(readable):
                self._reap(fd)
            if control in readable:
                what, fds = self._receive()
                if not what:
                    self._end_children()
                    return None
                for fd in fds:
                    sock = self._fork(fd)
                    if sock is not None and what == FORK_ENGINE:
                        return sock
                    if sock is not None:
                        self._become_spare(sock)

    def _receive(self) -> tuple[bytes, list[int]]:
        """What to fork, and the socket for it; nothing: the server is gone."""
        try:
            what, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        except OSError:
            return b"", []
        return what, fds

    def _become_spare(self, control: socket.socket) -> None:
        self._control = control
        self._children.clear()
        self._is_spare = True
        tell_system("comm", _SPARE_NAME)

    def _fork(self, fd: int) -> socket.socket | None:
        """Fork; returns the socket that ``fd`` is of in the new process."""
        if self._is_spare:  # the zygote that it was forked from is no more
            self._is_spare = False
            tell_system("comm", NAME)
        try:
            pid = os.fork()
        except OSError as error:
            os.close(fd)
            self.say(Failed("EngineDied", f"no process can be forked: {error}"))
            return None
        if pid == 0:
            for other in (self._control.detach(), *self._children):
                os.close(other)
            return socket.socket(fileno=fd)
        os.close(fd)
        pid_fd = os.pidfd_open(pid)
        self._children[pid_fd] = pid
        self.say(Forked(pid), (pid_fd,))
        return None

    def _reap(self, pid_fd: int) -> None:
        pid = self._children.pop(pid_fd)
        os.close(pid_fd)
        _, status = os.waitpid(pid, 0)
        self.say(Ended(pid, os.waitstatus_to_exitcode(status)))

    def _end_children(self) -> None:
        give_up_s = time.monotonic() + _GRACE_S
        while self._children:
            left_s = max(0.0, give_up_s - time.monotonic())
            ended, _, _ = select.select(list(self._children), [], [], left_s)
            for pid_fd in ended or list(self._children):
                if not ended:
                    signal.pidfd_send_signal(pid_fd, signal.SIGKILL)
                self._reap(pid_fd)
