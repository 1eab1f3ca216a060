"""The process that engines are forked from: it has imported everything and does nothing else.

Importing takes a second, forking a few milliseconds: so however fast engines die, the next one is a
fork away. A fork takes one thread along and leaves locks as they are, so this process has only one,
never computes anything and never touches a GPU.
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

from engine.link import Ended, Failed, Forked, FromZygote, Prepared, encode_frame

__all__ = ["Zygote"]

_GRACE_S = 5.0
"""Engines see as their zygote does that the server is gone, and end after their step; one that is
stuck is killed after so long."""


class Zygote:
    """Forks an engine for each socket that comes.

    Args:
        control: this process's end of a socket pair. Each message is one byte with a descriptor,
            the new engine's end of its link; the answer is ``Forked`` with a descriptor of the
            new process, or ``Failed``. Closing the other end asks for this process's end.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._children: dict[int, int] = {}
        """Descriptor of an engine's process to its process id."""

    def say(self, message: FromZygote, fds: tuple[int, ...] = ()) -> None:
        """Send a frame. Waits: the server reads at once what few words there are."""
        frame = encode_frame(message)
        with contextlib.suppress(OSError):  # the server is gone; waiting for its word will tell
            sent = socket.send_fds(self._control, [frame], list(fds))
            self._control.sendall(frame[sent:])

    def serve(self, prepare: Callable[[], object]) -> socket.socket | None:
        """Prepare, then fork until the server is gone.

        Returns in every forked process, with its link's socket, and in the end here, with None.
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
                fds = self._receive()
                if fds is None:
                    self._end_children()
                    return None
                for fd in fds:
                    if (link := self._fork(fd)) is not None:
                        return link

    def _receive(self) -> list[int] | None:
        """Sockets of engines to fork; None: the server is gone."""
        try:
            data, fds, _, _ = socket.recv_fds(self._control, 1, 1)
        except OSError:
            return None
        return fds if data else None

    def _fork(self, link_fd: int) -> socket.socket | None:
        """Fork; returns the link's socket in the new process."""
        try:
            pid = os.fork()
        except OSError as error:
            os.close(link_fd)
            self.say(Failed("EngineDied", f"no engine process can be forked: {error}"))
            return None
        if pid == 0:
            for fd in (self._control.detach(), *self._children):
                os.close(fd)
            return socket.socket(fileno=link_fd)
        os.close(link_fd)
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
