"""Watches the event loop: how late do its timers run, and is it our fault."""

from __future__ import annotations

import asyncio
import time

from server.metering.metrics import Metrics

__all__ = ["LoopWatch"]


class LoopWatch:
    """A timer that records its own delay, from ``start`` to ``stop``.

    On a shared machine a timer is also late because another process had the core. The CPU time
    that the loop's thread used since the timer before is an upper bound of what the loop's own
    callbacks held; the smaller of both is recorded as "blocked". (Callbacks that wait without using
    the CPU, on a file or a lock, are found by the tests instead: blockbuster refuses them.)
    """

    def __init__(self, metrics: Metrics, interval_s: float = 0.02) -> None:
        self._metrics = metrics
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None
        self._cpu_s = 0.0

    def start(self) -> None:
        """Begin to watch the running loop; must be called in its thread."""
        self._cpu_s = time.thread_time()
        self._arm(asyncio.get_running_loop())

    def stop(self) -> None:
        """End the watch; may be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        due = loop.time() + self._interval_s
        self._timer = loop.call_at(due, self._tick, loop, due)

    def _tick(self, loop: asyncio.AbstractEventLoop, due: float) -> None:
        lag_s = max(0.0, loop.time() - due)
        cpu_s = time.thread_time()
        self._metrics.loop_lag(lag_s, min(lag_s, cpu_s - self._cpu_s))
        self._cpu_s = cpu_s
        self._arm(loop)
