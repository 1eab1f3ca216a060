"""The seam between the server's process and the engine's: msgpack frames on a socket pair.

A frame is a 4-byte big-endian length and one message. There is one frame per engine step for the
whole batch. The engine's end never blocks on writing: what the socket does not take stays in memory
and goes out with the next frame, so a slow server cannot slow a step.
"""

from __future__ import annotations

import select
import socket
import struct

import msgspec

from engine.config import EngineConfig
from engine.types import Delta, EngineStats, ModelInfo, Request

__all__ = [
    "FORK_ENGINE",
    "FORK_ZYGOTE",
    "HEARTBEAT_S",
    "Abort",
    "Configure",
    "Ended",
    "Failed",
    "Forked",
    "FrameError",
    "FromEngine",
    "FromZygote",
    "Link",
    "LinkClosed",
    "Loading",
    "Prepared",
    "Ready",
    "Step",
    "Submit",
    "ToEngine",
    "Working",
    "encode_frame",
    "pop_frames",
]

_HEADER = struct.Struct(">I")
HEARTBEAT_S = 0.5
"""An idle engine says this often that it lives."""
MAX_FRAME_BYTES = 256 * 2**20
"""A longer frame means that the two ends lost step with each other."""


FORK_ENGINE, FORK_ZYGOTE = b"e", b"z"
"""What a zygote is asked for, with a descriptor: the new process's end of a socket pair."""


class Configure(msgspec.Struct, frozen=True, tag=True):
    """First message to a new engine process."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag=True):
    """Take this request."""

    request: Request


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End this request; unknown ids are ignored."""

    request_id: str
    asked_s: float
    """``time.monotonic()`` of the server when it asked; both processes have the same clock."""


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """Everything is imported: engines can be forked."""


class Forked(msgspec.Struct, frozen=True, tag=True):
    """A process was forked; a descriptor of it (pidfd) comes with this frame."""

    pid: int


class Ended(msgspec.Struct, frozen=True, tag=True):
    """A forked process ended."""

    pid: int
    exit_code: int
    """Negative: the number of the signal that ended it."""


class Loading(msgspec.Struct, frozen=True, tag=True):
    """How far the start has come."""

    stage: str
    fraction: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded and requests are served."""

    info: ModelInfo


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The start failed. ``kind`` is the name of an error type of ``engine.errors``."""

    kind: str
    message: str


class Step(msgspec.Struct, frozen=True, tag=True):
    """What a step brought; an idle engine sends empty ones as its heartbeat."""

    deltas: list[Delta]
    stats: EngineStats


class Working(msgspec.Struct, frozen=True, tag=True):
    """The loop is within a step and comes further."""

    silence_s: float
    """So long may pass until it says so again."""


ToEngine = Configure | Submit | Abort
FromEngine = Loading | Ready | Failed | Step | Working
FromZygote = Loading | Prepared | Forked | Ended | Failed


class LinkClosed(Exception):
    """The other process closed its end or is gone."""


class FrameError(Exception):
    """The byte stream does not hold frames of this protocol."""


def encode_frame(message: ToEngine | FromEngine | FromZygote) -> bytes:
    """Return the message as one frame."""
    body = msgspec.msgpack.encode(message)
    return _HEADER.pack(len(body)) + body


def pop_frames(buffer: bytearray) -> list[bytes]:
    """Take all complete frames off the front of ``buffer`` and return their bodies.

    Raises FrameError on a length no frame can have.
    """
    bodies = []
    start = 0
    while len(buffer) - start >= _HEADER.size:
        (length,) = _HEADER.unpack_from(buffer, start)
        if length > MAX_FRAME_BYTES:
            raise FrameError(f"a frame of {length} bytes; the most is {MAX_FRAME_BYTES}")
        end = start + _HEADER.size + length
        if len(buffer) < end:
            break
        bodies.append(bytes(buffer[start + _HEADER.size : end]))
        start = end
    del buffer[:start]
    return bodies


class Link:
    """The engine's end: receives when it chooses to, sends without ever waiting."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._incoming = bytearray()
        self._outgoing = bytearray()
        self._decoder = msgspec.msgpack.Decoder(ToEngine)

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """Return the messages that are there, waiting up to ``timeout_s`` for the first of them.

        Raises LinkClosed when the server is gone, FrameError on a damaged stream.
        """
        writers = [self._sock] if self._outgoing else []
        readable, writable, _ = select.select([self._sock], writers, [], timeout_s)
        if writable:
            self._flush()
        if readable:
            self._read_available()
        return [self._decoder.decode(body) for body in pop_frames(self._incoming)]

    def send(self, message: FromEngine) -> None:
        """Send a frame, or keep it for later if the socket is full. Raises LinkClosed."""
        self._outgoing += encode_frame(message)
        self._flush()

    def drain(self, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` until all that was sent has left. Raises LinkClosed."""
        while self._outgoing and select.select([], [self._sock], [], timeout_s)[1]:
            self._flush()

    def _read_available(self) -> None:
        while True:
            try:
                chunk = self._sock.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError as error:
                raise LinkClosed from error
            if not chunk:
                raise LinkClosed
            self._incoming += chunk

    def _flush(self) -> None:
        try:
            while self._outgoing:
                del self._outgoing[: self._sock.send(self._outgoing)]
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkClosed from error
