"""EngineClient: the asyncio side of the link.

It starts the engine process, starts it again when it dies, and gives every request its own stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum

import msgspec

from engine import errors
from engine.config import EngineConfig
from engine.errors import EngineClosed, EngineDied, EngineError, RequestError
from engine.link import (
    Abort,
    Configure,
    Failed,
    FromEngine,
    Loading,
    Ready,
    Step,
    Submit,
    ToEngine,
    encode_frame,
    pop_frames,
)
from engine.types import Delta, EngineStats, FinishReason, ModelInfo, Request

__all__ = ["EngineClient", "EngineState", "RequestStream"]

log = logging.getLogger("millrace.engine")

MAX_RESTARTS = 5
"""Starts in a row that may fail before the client gives up."""
RESTART_DELAY_S = 0.2
"""Wait before the first restart; doubles with each failure in a row."""

ENGINE_COMMAND = (sys.executable, "-m", "engine")
"""Started with the number of its end of the socket pair as last argument."""

Progress = Callable[[str, float], None]


class EngineState(Enum):
    """Life of the engine process as the client sees it."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    CLOSED = "closed"


_NEXT = {
    EngineState.STARTING: {EngineState.READY, EngineState.CLOSED},
    EngineState.READY: {EngineState.RESTARTING, EngineState.CLOSED},
    EngineState.RESTARTING: {EngineState.READY, EngineState.CLOSED},
    EngineState.CLOSED: set(),
}


class RequestStream:
    """The deltas of one request, in order; iteration ends after the one with a finish reason.

    It is a mailbox of one slot: deltas that arrive before the reader comes are merged into one, so
    a slow reader costs no memory per step. Leaving early needs ``aclose``, which aborts the
    request. Iterating raises EngineDied, EngineClosed or RequestError when it cannot go on.
    """

    def __init__(self, request_id: str, on_leave: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._on_leave = on_leave
        self._slot: Delta | None = None
        self._error: EngineError | None = None
        self._ended = False
        self._arrived = asyncio.Event()

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> Delta:
        if self._ended:
            raise StopAsyncIteration
        await self._arrived.wait()
        delta, self._slot = self._slot, None
        if delta is None:
            self._ended = True
            assert self._error is not None
            raise self._error
        if self._error is None:
            self._arrived.clear()
        self._ended = delta.finish_reason is not None
        return delta

    async def aclose(self) -> None:
        """Abort the request if it has not ended."""
        if not self._ended:
            self._ended = True
            self._on_leave(self.request_id)

    def push(self, delta: Delta) -> None:
        """Hand in what a step brought."""
        if delta.finish_reason is FinishReason.ERROR:
            self.fail(RequestError(delta.error or "the engine refused the request"))
            return
        self._slot = delta if self._slot is None else _merge(self._slot, delta)
        self._arrived.set()

    def fail(self, error: EngineError) -> None:
        """End the stream with an error, after what has already arrived."""
        self._error = error
        self._arrived.set()


def _merge(first: Delta, second: Delta) -> Delta:
    logprobs = None
    if first.logprobs is not None or second.logprobs is not None:
        logprobs = (first.logprobs or []) + (second.logprobs or [])
    return Delta(
        request_id=first.request_id,
        token_ids=first.token_ids + second.token_ids,
        logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or second.prompt_logprobs,
        finish_reason=second.finish_reason,
        usage=second.usage,
    )


class EngineClient:
    """One engine process and the requests in flight on it."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: Progress | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._command = command
        self._state = EngineState.STARTING
        self._info: ModelInfo | None = None
        self._stats = EngineStats()
        self._last_progress_s = time.monotonic()
        self._streams: dict[str, RequestStream] = {}
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor: asyncio.Task[None] | None = None
        self.restarts = 0
        """How often the engine process was started again."""

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        *,
        on_progress: Progress | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> EngineClient:
        """Start an engine process and wait until it serves.

        Raises ConfigError, CheckpointError and other errors of a start; no process is left then.
        """
        client = cls(config, on_progress, command)
        client._supervisor = asyncio.create_task(client._supervise(), name="engine-supervisor")
        try:
            await asyncio.shield(client._started)
        except BaseException:
            await client.close()
            raise
        return client

    @property
    def state(self) -> EngineState:
        """Whether requests can be served now."""
        return self._state

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        assert self._info is not None
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The engine's figures after its latest step; counters begin again with a new process."""
        return self._stats

    @property
    def last_progress_s(self) -> float:
        """``time.monotonic()`` of the latest frame: a step's, or an idle engine's heartbeat."""
        return self._last_progress_s

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._process.pid if self._process else None

    def generate(self, request: Request) -> RequestStream:
        """Submit a request at once and return its deltas.

        Raises EngineClosed when no engine is ready, RequestError on a request id that is in use.
        """
        if self._state is not EngineState.READY:
            raise EngineClosed(f"the engine is {self._state.value}; try again in a few seconds")
        if request.request_id in self._streams:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        stream = RequestStream(request.request_id, self._leave)
        self._streams[request.request_id] = stream
        self._send(Submit(request))
        return stream

    def abort(self, request_id: str) -> None:
        """Ask for a request's end; its stream then ends with FinishReason.ABORT."""
        if request_id in self._streams:
            self._send(Abort(request_id))

    async def close(self) -> None:
        """End the engine process; requests in flight get EngineClosed. Idempotent."""
        if self._state is not EngineState.CLOSED:
            self._move(EngineState.CLOSED)
        self._fail_all(EngineClosed("the engine was shut down"))
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        if not self._started.done():
            self._started.cancel()

    def _leave(self, request_id: str) -> None:
        if self._streams.pop(request_id, None) is not None:
            self._send(Abort(request_id))

    def _move(self, state: EngineState) -> None:
        if state not in _NEXT[self._state]:
            raise AssertionError(f"engine state {self._state.value} -> {state.value} is illegal")
        self._state = state

    def _send(self, message: ToEngine) -> None:
        if self._writer is not None:
            self._writer.write(encode_frame(message))

    def _fail_all(self, error: EngineError) -> None:
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(error)

    async def _supervise(self) -> None:
        """Run engine processes one after the other until one cannot be started."""
        failures = 0
        while True:
            try:
                await self._run_process()
            except EngineError as error:
                if not self._started.done():
                    self._started.set_exception(error)
                    return
                log.error("engine start failed: %s", error)
            served = self._state is EngineState.READY
            failures = 1 if served else failures + 1
            if served:
                self._move(EngineState.RESTARTING)
            self._fail_all(EngineDied("the engine process ended while it served this request"))
            if failures > MAX_RESTARTS:
                log.critical("engine failed %d times in a row; giving up", failures)
                self._move(EngineState.CLOSED)
                return
            await asyncio.sleep(RESTART_DELAY_S * 2 ** (failures - 1))
            self.restarts += 1

    async def _run_process(self) -> None:
        """Start one engine process and serve its frames until it ends; leaves nothing behind."""
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, str(theirs.fileno()), pass_fds=[theirs.fileno()]
            )
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            reader, self._writer = await asyncio.open_connection(sock=ours)
            self._send(Configure(self._config))
            await self._read_frames(reader)
        finally:
            await self._end_process()
        if self._state is not EngineState.READY:
            raise EngineDied(f"the engine process ended at its start ({self._exit_text()})")
        log.error("engine process ended (%s); starting it again", self._exit_text())

    async def _read_frames(self, reader: asyncio.StreamReader) -> None:
        decoder = msgspec.msgpack.Decoder(FromEngine)
        buffer = bytearray()
        with contextlib.suppress(ConnectionError):
            while chunk := await reader.read(1 << 18):
                buffer += chunk
                for body in pop_frames(buffer):
                    self._handle(decoder.decode(body))

    def _handle(self, message: FromEngine) -> None:
        self._last_progress_s = time.monotonic()
        match message:
            case Step(deltas, stats):
                self._stats = stats
                for delta in deltas:
                    self._deliver(delta)
            case Loading(stage, fraction):
                if self._on_progress is not None:
                    self._on_progress(stage, fraction)
            case Ready(info):
                self._info = info
                self._move(EngineState.READY)
                if not self._started.done():
                    self._started.set_result(None)
            case Failed(kind, text):
                raise getattr(errors, kind, EngineError)(text)

    def _deliver(self, delta: Delta) -> None:
        stream = self._streams.get(delta.request_id)
        if stream is None:
            return
        if delta.finish_reason is not None:
            del self._streams[delta.request_id]
        stream.push(delta)

    async def _end_process(self) -> None:
        """Close our end, which asks the process to stop, and make sure that it does."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        assert self._process is not None
        try:
            async with asyncio.timeout(5.0):
                await self._process.wait()
        except TimeoutError:
            log.warning("engine process %d does not stop; killing it", self._process.pid)
            self._process.kill()
            await self._process.wait()
        except asyncio.CancelledError:
            self._process.kill()
            raise

    def _exit_text(self) -> str:
        assert self._process is not None
        code = self._process.returncode
        return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
