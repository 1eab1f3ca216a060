"""The process that engines are forked from, with its fork replaced; and the count of deaths."""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from engine.link import FORK_ENGINE, FORK_ZYGOTE, Failed, FromZygote, Prepared, pop_frames
from engine.recovery import RESTART_DELAY_S, Recovery
from engine.zygote import Zygote


class Served:
    """A zygote that runs in a thread of this process; it must not fork there."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair()
        self.control.settimeout(10.0)
        self.prepared = threading.Event()
        self.returned: list[socket.socket | None] = []
        zygote = Zygote(theirs)

        def serve() -> None:
            with theirs:
                self.returned.append(zygote.serve(self.prepared.set))

        self.thread = threading.Thread(target=serve)
        self.thread.start()
        self._decoder = msgspec.msgpack.Decoder(FromZygote)
        self._buffer = bytearray()

    def message(self) -> object:
        while not (bodies := pop_frames(self._buffer)):
            self._buffer += self.control.recv(1 << 16)
        (body,) = bodies
        return self._decoder.decode(body)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    def refuse() -> int:
        raise OSError(errno.EAGAIN, "too many processes")

    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    monkeypatch.setattr(os, "fork", refuse)
    served = Served()
    yield served
    served.control.close()
    served.thread.join(10.0)
    gc.unfreeze()
    assert served.returned == [None], "it ends when the server is gone"


def test_it_prepares_and_says_so(served: Served) -> None:
    assert served.message() == Prepared()
    assert served.prepared.is_set()


def test_a_fork_that_fails_is_said_and_the_next_is_tried(served: Served) -> None:
    assert served.message() == Prepared()
    for what in (FORK_ENGINE, FORK_ZYGOTE, FORK_ENGINE):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            socket.send_fds(served.control, [what], [theirs.fileno()])
            failed = served.message()
            assert isinstance(failed, Failed)
            assert "too many processes" in failed.message
            theirs.close()
            assert ours.recv(1) == b"", "its end of the link is kept open"


def test_starts_that_bring_nothing_are_ever_further_apart() -> None:
    recovery = Recovery()
    assert recovery.died(10.0)
    assert recovery.delay_s == 0.0
    delays = []
    for _ in range(8):
        recovery.start_failed()
        delays.append(recovery.delay_s)
    assert delays[0] == RESTART_DELAY_S
    assert delays == sorted(delays)
    assert delays[-1] == delays[-2] == 5.0
    recovery.brought()
    assert not recovery.died(11.0)
    assert recovery.delay_s == 0.0


def test_what_clients_waited_is_from_the_first_death_of_a_row() -> None:
    recovery = Recovery()
    assert recovery.recovered(5.0) is None
    recovery.died(10.0)
    recovery.died(12.0)
    assert recovery.recovered(13.5) == 3.5
    assert recovery.recovered(14.0) is None
    assert (recovery.figures.recovered, recovery.figures.recovery_s) == (1, 3.5)
