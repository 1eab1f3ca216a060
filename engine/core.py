"""The engine process's loop: receive, plan, launch, collect, commit, emit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

from engine.errors import RequestError
from engine.link import HEARTBEAT_S, Abort, FromEngine, LinkClosed, Step, Submit, ToEngine
from engine.scheduler import Plan, Scheduler, StepOutput
from engine.types import Delta, EngineStats, FinishReason, Request, Usage

__all__ = ["Channel", "Core", "Forward", "Launched", "StepFailed", "is_lack_of_memory"]

T = TypeVar("T")

_PROMPT_STEPS = 2
"""An abort whose blocks were free after no more steps came in time."""
_LONG_STEP = 16
"""Tokens from which a step is worth looking up from: fewer end soon anyway."""
_KEPT_ENDS = 64
"""Steps over which an abort can be traced back; a longer way counts as so many."""


class Channel(Protocol):
    """The engine's end of the link."""

    def receive(self, timeout_s: float) -> list[ToEngine]:
        """Return what has come, waiting up to ``timeout_s`` for the first message."""
        ...

    def send(self, message: FromEngine) -> None:
        """Hand a message over without waiting for its reader."""
        ...


class Launched(Protocol):
    """A step that is computed, or was."""

    def collect(self) -> StepOutput:
        """Wait for the end of the step, which those launched before it have reached, too."""
        ...


class Forward(Protocol):
    """What turns a plan into tokens."""

    def launch(self, plan: Plan, between: Callable[[], None]) -> Launched:
        """Begin to compute the plan's rows and to draw a token for those that sample.

        A device computes steps in the order in which they are launched. ``between`` is called now
        and then meanwhile; when it raises, the step is left as not computed.
        """
        ...


class _Flight(NamedTuple):
    plan: Plan
    step: Launched


class _GivesWay(Exception):
    """The running step is dropped for a request that came meanwhile."""


class StepFailed(Exception):
    """A step could not be computed; the reason is the cause of this error."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(
            f"a step of {len(plan.rows)} requests with {plan.num_tokens} new tokens failed"
        )


def is_lack_of_memory(error: BaseException | None) -> bool:
    """Whether this says that there was not enough memory, of the system's or of a device's."""
    # torch has a type for a GPU's memory, but none for the CPU's.
    names = [kind.__name__ for kind in type(error).__mro__]
    typed = "MemoryError" in names or "OutOfMemoryError" in names
    return typed or "can't allocate memory" in str(error)


def _go_on() -> None:
    pass


class Core:
    """Drives one scheduler and one runner until the link closes.

    Args:
        link: to the server.
        scheduler: plans steps.
        runner: computes them.
        vocab_size: tokens of the model.
        steps_ahead: steps that are launched before the outcome of the one before them is known,
            0 or 1.
        check_integrity: check the scheduler's books whenever it is idle.
    """

    def __init__(
        self,
        link: Channel,
        scheduler: Scheduler,
        runner: Forward,
        *,
        vocab_size: int,
        steps_ahead: int = 0,
        check_integrity: bool = False,
    ) -> None:
        self._link = link
        self._scheduler = scheduler
        self._runner = runner
        self._vocab_size = vocab_size
        self._steps_ahead = steps_ahead
        self._check_integrity = check_integrity
        self._flights: deque[_Flight] = deque()
        self._steps = 0
        self._dropped_steps = 0
        self._step_s = 0.0
        self._busy_s = 0.0
        self._step_ends_s: deque[float] = deque(maxlen=_KEPT_ENDS)
        self._aborts = 0
        self._abort_steps = 0
        self._late_aborts = 0

    def run(self) -> None:
        """Serve until the server closes its end, which raises LinkClosed."""
        while True:
            self.turn()

    def turn(self) -> None:
        """Do one round: take what has come, compute one step, hand out what it brought."""
        has_work = self._scheduler.has_work or self._flights
        deltas = self._receive(0.0 if has_work else HEARTBEAT_S)
        started = time.monotonic()
        try:
            self._launch(deltas)
        except _GivesWay:
            self._dropped_steps += 1
        if self._flights:
            plan, step = self._flights.popleft()
            output = self._attempt(plan, step.collect)
            deltas += self._scheduler.commit(plan, output)
            self._count_step(started)
        elif self._check_integrity and not self._scheduler.has_work:
            self._scheduler.check_integrity()
        self._link.send(Step(deltas, self.stats()))

    def _launch(self, deltas: list[Delta]) -> None:
        """Launch the next step, and then what may be ahead of it."""

        def look_up() -> None:
            # What is aborted here frees blocks that the step may still write to, but nobody is
            # given them before the next plan.
            deltas.extend(self._receive(0.0))
            if self._scheduler.gives_way():
                raise _GivesWay

        while len(self._flights) <= self._steps_ahead:
            plan = self._scheduler.plan(after=self._flights[-1].plan if self._flights else None)
            if not plan.rows:
                return
            # Where steps are only launched here, this is not the time that they take.
            looks = plan.num_tokens >= _LONG_STEP and not self._steps_ahead
            launch = partial(self._runner.launch, plan, look_up if looks else _go_on)
            self._flights.append(_Flight(plan, self._attempt(plan, launch)))

    def _attempt(self, plan: Plan, call: Callable[[], T]) -> T:
        try:
            return call()
        except (LinkClosed, _GivesWay):  # LinkClosed: the server went away in the middle of it
            raise
        except Exception as error:
            # Which of its requests is to blame is not known here, nor what the failed step left
            # behind, least of all without memory. A new process has both clean, and whoever hands
            # the requests on to it finds out which one kills engines.
            raise StepFailed(plan) from error

    def stats(self) -> EngineStats:
        """Return the engine's figures as they stand."""
        return EngineStats(
            **self._scheduler.stats(),
            steps=self._steps,
            dropped_steps=self._dropped_steps,
            step_s=self._step_s,
            busy_s=self._busy_s,
            aborts=self._aborts,
            abort_steps=self._abort_steps,
            late_aborts=self._late_aborts,
        )

    def _receive(self, timeout_s: float) -> list[Delta]:
        """Apply incoming messages, waiting up to ``timeout_s`` for the first of them."""
        deltas = []
        for message in self._link.receive(timeout_s):
            match message:
                case Submit(request):
                    if last := self._add(request):
                        deltas.append(last)
                case Abort(request_id, asked_s):
                    if last := self._scheduler.abort(request_id):
                        deltas.append(last)
                        self._count_abort(sum(end_s > asked_s for end_s in self._step_ends_s))
                case _:
                    raise AssertionError(f"{type(message).__name__} after the start")
        return deltas

    def _add(self, request: Request) -> Delta | None:
        """Take a request; returns its last delta if it is refused or has nothing left to do."""
        try:
            highest = max(max(request.prompt_ids, default=0), max(request.output_ids, default=0))
            if highest >= self._vocab_size:
                raise RequestError(
                    f"token id {highest} is not one of the model's {self._vocab_size}: "
                    "do tokenizer and model belong together?"
                )
            return self._scheduler.add(request)
        except RequestError as error:
            return Delta(
                request_id=request.request_id,
                token_ids=[],
                finish_reason=FinishReason.ERROR,
                usage=Usage(len(request.prompt_ids), 0, len(request.output_ids), 0),
                error=str(error),
            )

    def _count_abort(self, num_steps: int) -> None:
        self._aborts += 1
        self._abort_steps += num_steps
        self._late_aborts += num_steps > _PROMPT_STEPS

    def _count_step(self, started_s: float) -> None:
        now_s = time.monotonic()
        duration_s = now_s - started_s
        self._step_ends_s.append(now_s)
        self._steps += 1
        self._step_s = duration_s
        self._busy_s += duration_s
