"""EngineClient: the asyncio side of the link.

It starts the engine process, gives every request a stream of its own, and when the process dies or
hangs, starts another and has it go on with what was in flight. A reader of a stream notices nothing
but the time that takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Sequence
from enum import Enum

from engine import errors
from engine.config import EngineConfig
from engine.errors import EngineClosed, EngineDied, EngineError, RequestError
from engine.inflight import InFlight
from engine.link import (
    Abort,
    Configure,
    Failed,
    FrameError,
    FromEngine,
    Loading,
    Prepared,
    Ready,
    Step,
    Submit,
    Working,
)
from engine.nursery import Nursery, ZygoteProcess
from engine.process import EngineProcess
from engine.recovery import RESTART_DELAY_S, Recovery
from engine.starvation import Starvation
from engine.streams import RequestStream
from engine.types import EngineStats, ModelInfo, Recoveries, Request
from engine.watchdog import TICK_S, Watchdog

__all__ = ["EngineClient", "EngineState", "RequestStream"]

log = logging.getLogger("millrace.engine")

MAX_FAILED_STARTS = 6
"""Starts in a row that may fail before the client gives up."""
MAX_WAITING = 256
"""Requests that may be submitted while there is no engine, beside those that wait for it."""
PATIENCE_S = 60.0
"""How long requests wait for an engine at least; three times its first start if that is longer."""
STOP_S = 5.0
"""How long an engine may take to end its step when it is asked to stop."""
REMAINS_S = 1.0
"""How long what is left of a dead engine may take to go."""

ENGINE_COMMAND = (sys.executable, "-m", "engine")
"""Started with the number of its end of a socket pair as last argument; forks engines."""

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


class EngineClient:
    """One engine process after the other, and the requests in flight."""

    def __init__(
        self,
        config: EngineConfig,
        on_progress: Progress | None = None,
        command: Sequence[str] = ENGINE_COMMAND,
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._state = EngineState.STARTING
        self._info: ModelInfo | None = None
        self._stats = EngineStats()
        self._past = EngineStats()
        """What the counters of dead processes had come to."""
        self._recovery = Recovery()
        self._in_flight = InFlight()
        self._nursery = Nursery(command, self._on_birth)
        self._process: EngineProcess | None = None
        self._watchdog = Watchdog()
        self._last_progress_s = time.monotonic()
        self._patience_s = PATIENCE_S
        self._room = MAX_WAITING
        """Most requests in flight while there is no engine."""
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._supervisor: asyncio.Task[None] | None = None

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
        began_s = time.monotonic()
        client._supervisor = asyncio.create_task(client._supervise(), name="engine-supervisor")
        try:
            await asyncio.shield(client._started)
        except BaseException:
            await client.close()
            raise
        client._patience_s = max(PATIENCE_S, 3 * (time.monotonic() - began_s))
        return client

    @property
    def state(self) -> EngineState:
        """Whether there is an engine now."""
        return self._state

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""
        assert self._info is not None
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The engine's figures after its latest step; counters go on over its deaths."""
        return self._stats.on_top_of(self._past)

    @property
    def recoveries(self) -> Recoveries:
        """What became of engines that died, since this client was started."""
        return self._recovery.figures

    @property
    def last_progress_s(self) -> float:
        """``time.monotonic()`` of the engine's latest sign that it comes further, or is idle."""
        return self._last_progress_s

    @property
    def pid(self) -> int | None:
        """Process id of the engine, while there is one."""
        return self._process.pid if self._process else None

    def generate(self, request: Request) -> RequestStream:
        """Submit a request and return its deltas.

        While a dead engine is replaced, the request waits for the next one with those in flight.
        Raises EngineClosed when there is none and will be none, or too many wait; RequestError on a
        request id that is in use.
        """
        if self._state in (EngineState.STARTING, EngineState.CLOSED):
            raise EngineClosed(f"the engine is {self._state.value}")
        if self._state is EngineState.RESTARTING and len(self._in_flight) >= self._room:
            raise EngineClosed(
                f"the engine is restarting and {len(self._in_flight)} requests wait for it; "
                "try again in a few seconds"
            )
        if request.request_id in self._in_flight:
            raise RequestError(f"request id {request.request_id!r} is in use", param="request_id")
        stream = RequestStream(request.request_id, self._leave)
        self._in_flight.add(request, stream)
        self._submit()
        return stream

    def abort(self, request_id: str) -> None:
        """Ask for a request's end; its stream then ends with FinishReason.ABORT.

        At once where no engine has the request, else when the engine has answered.
        """
        if self._in_flight.abort(request_id) and self._process is not None:
            self._process.send(Abort(request_id, time.monotonic()))

    async def close(self) -> None:
        """End all processes; requests in flight get EngineClosed. Idempotent."""
        if self._state is not EngineState.CLOSED:
            self._move(EngineState.CLOSED)
        self._in_flight.fail_all(EngineClosed("the engine was shut down"))
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        await self._nursery.close()
        if not self._started.done():
            self._started.cancel()

    def _leave(self, request_id: str) -> None:
        if self._in_flight.drop(request_id) and self._process is not None:
            self._process.send(Abort(request_id, time.monotonic()))

    def _move(self, state: EngineState) -> None:
        if state not in _NEXT[self._state]:
            raise AssertionError(f"engine state {self._state.value} -> {state.value} is illegal")
        self._state = state

    def _submit(self) -> None:
        if self._state is EngineState.READY and self._process is not None:
            for request in self._in_flight.due():
                self._process.send(Submit(request))

    async def _supervise(self) -> None:
        """Run engine processes one after the other until none can be started any more."""
        try:
            await self._run_processes()
        except Exception as error:
            # Whatever it is, those who wait must not wait for ever.
            log.critical("the engine's supervisor failed", exc_info=error)
            if not self._started.done():
                self._started.set_exception(error)
        finally:
            if self._state is not EngineState.CLOSED:
                self._move(EngineState.CLOSED)
            lost = EngineDied("the engine died and cannot be started again")
            self._recovery.count(given_up=self._in_flight.fail_all(lost))

    async def _run_processes(self) -> None:
        failed_starts = 0
        while failed_starts < MAX_FAILED_STARTS:
            if self._started.done():
                self._recovery.count(restarts=1)
                await asyncio.sleep(self._recovery.delay_s)
            try:
                await self._run_process()
                failed_starts = 0
            except EngineError as error:
                if not self._started.done():
                    self._started.set_exception(error)
                    return
                failed_starts += 1
                self._recovery.start_failed()
                log.error("engine start failed: %s", error)
        log.critical("engine failed %d times in a row; giving up", failed_starts)

    async def _run_process(self) -> None:
        """Start one engine process and serve until it ends; leaves nothing of it behind.

        Raises EngineError when it did not come so far as to serve.
        """
        self._process = process = await self._fork()
        self._watchdog.begin(prepared=True)
        watch = asyncio.create_task(self._watch(process), name="engine-watch")
        try:
            process.send(Configure(self._config))
            while messages := await process.read():
                for message in messages:
                    self._handle(message)
        except FrameError as error:
            log.error("engine process %d: %s", process.pid, error)
        finally:
            watch.cancel()
            self._process = None
            if served := self._state is EngineState.READY:
                self._on_death()
            await process.end(STOP_S if self._state is EngineState.CLOSED else REMAINS_S)
        if not served:
            raise EngineDied(f"the engine process ended at its start ({process.exit_text})")
        log.error(
            "engine process %d ended (%s) with %d requests in flight; starting another",
            process.pid,
            process.exit_text,
            len(self._in_flight),
        )

    async def _fork(self) -> EngineProcess:
        """Have a process forked, off a new zygote if there is none. Raises EngineDied."""
        try:
            zygote = await self._nursery.start()
        except OSError as error:
            raise EngineDied(f"no engine process can be started: {error}") from error
        self._watchdog.begin(prepared=zygote.prepared)
        watch = asyncio.create_task(self._watch(zygote), name="zygote-watch")
        try:
            return await zygote.fork()
        finally:
            watch.cancel()

    async def _watch(self, process: EngineProcess | ZygoteProcess) -> None:
        """Kill the process when it hangs; its end is then noticed as any other."""
        starvation = Starvation(process.pid)
        then_s = time.monotonic()
        hung = False
        while not hung:
            await asyncio.sleep(TICK_S)
            now_s = time.monotonic()
            elapsed_s = now_s - then_s
            hung = self._watchdog.tick(elapsed_s, starvation.since_last_call(elapsed_s))
            then_s = now_s
        log.error(
            "engine process %d made no progress for %.1f s; killing it",
            process.pid,
            self._watchdog.silent_s,
        )
        self._recovery.count(hangs=1)
        process.kill()
        await asyncio.sleep(REMAINS_S)
        process.hang_up()

    def _on_birth(self, message: Loading | Prepared) -> None:
        """A zygote comes further; one that replaces another behind a living engine is no matter."""
        if self._process is None:
            self._watchdog.loading()
            if isinstance(message, Loading) and self._on_progress is not None:
                self._on_progress(message.stage, message.fraction)

    def _handle(self, message: FromEngine) -> None:
        match message:
            case Step():
                self._on_step(message)
            case Working(silence_s) if self._state is EngineState.READY:
                self._progress(silence_s)
            case Working():
                self._watchdog.loading()
            case Loading(stage, fraction):
                self._watchdog.loading()
                if self._on_progress is not None:
                    self._on_progress(stage, fraction)
            case Ready(info):
                self._info = info
                self._on_ready()
            case Failed(kind, text):
                raise getattr(errors, kind, EngineError)(text)

    def _progress(self, allow_s: float = 0.0) -> None:
        self._last_progress_s = time.monotonic()
        self._watchdog.progress(allow_s)

    def _on_step(self, step: Step) -> None:
        # A frame alone proves little: a loop may go round without computing anything, or have lost
        # a request. Progress is a step that was computed, an answer, or having nothing to do.
        advanced = step.deltas or step.stats.steps != self._stats.steps
        if advanced or not self._in_flight.num_submitted:
            self._progress()
        self._stats = step.stats
        for delta in step.deltas:
            self._in_flight.deliver(delta)
        if step.deltas:
            self._recovery.brought()
            self._on_recovery()
            self._submit()

    def _on_ready(self) -> None:
        self._move(EngineState.READY)
        self._progress()
        if not self._started.done():
            self._started.set_result(None)
        self._submit()
        if not self._in_flight.num_submitted:
            self._on_recovery()

    def _on_death(self) -> None:
        self._move(EngineState.RESTARTING)
        died_s = self._last_progress_s
        if self._recovery.died(died_s):
            loop = asyncio.get_running_loop()
            loop.call_later(self._patience_s, self._lose_patience, died_s)
        self._past = self.stats
        self._stats = EngineStats()
        submitted = self._in_flight.num_submitted
        given_up = self._in_flight.engine_died()
        if given_up:
            log.error("%d requests are given up: engines die while they compute them", given_up)
        self._room = len(self._in_flight) + MAX_WAITING
        replayed = min(submitted, len(self._in_flight))
        self._recovery.count(replayed=replayed, given_up=given_up)

    def _on_recovery(self) -> None:
        """An engine computes again; how long its clients waited is from the last sign of life."""
        if (duration_s := self._recovery.recovered(time.monotonic())) is not None:
            log.warning("engine process %s took over after %.2f s", self.pid, duration_s)

    def _lose_patience(self, died_s: float) -> None:
        if self._recovery.died_s != died_s:
            return
        if self._state is EngineState.READY:  # a process that may die as those before it did
            loop = asyncio.get_running_loop()
            loop.call_later(RESTART_DELAY_S, self._lose_patience, died_s)
        elif self._state is EngineState.RESTARTING:
            lost = self._in_flight.fail_all(
                EngineDied(f"no engine came up within {self._patience_s:.0f} seconds")
            )
            self._recovery.count(given_up=lost)
