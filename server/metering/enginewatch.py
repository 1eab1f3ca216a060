"""Reads the engine's figures at short intervals."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from engine import EngineStats
from server.metering.metrics import Metrics

__all__ = ["EngineWatch"]


class EngineWatch:
    """A timer that hands the engine's figures on, from ``start`` to ``stop``.

    A new engine process counts from 0 again. Were the figures read only when somebody asks for the
    metrics, what a dead process did since would be lost, and its successor could be taken for it.
    """

    def __init__(
        self, metrics: Metrics, stats: Callable[[], EngineStats], interval_s: float = 0.5
    ) -> None:
        self._metrics = metrics
        self._stats = stats
        self._interval_s = interval_s
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to watch, in the running loop."""
        self._tick(asyncio.get_running_loop())

    def stop(self) -> None:
        """End the watch; may be called twice."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._metrics.engine_stats(self._stats())
        self._timer = loop.call_later(self._interval_s, self._tick, loop)
