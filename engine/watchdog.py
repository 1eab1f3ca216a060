"""When an engine counts as hung, seen from the server's side. No I/O and no clock."""

from __future__ import annotations

__all__ = ["HANG_S", "TICK_S", "Watchdog"]

TICK_S = 0.1
HANG_S = 1.75
"""Silence after which an engine that serves is hung. It says something after every step, twice a
second when idle, and several times a second from within a long step; with a tick's delay a hang is
noticed within two seconds. Where one piece of a step may take longer, the engine says so first."""
_FIRST_START_S = 900.0
"""Silence allowed in the first start, in which kernels may be compiled and pages come from disk."""
_LATER_START_S = 20.0
"""The least that is allowed in later starts; more if the first one had a longer silence."""
_START_FACTOR = 5.0


class Watchdog:
    """Adds up an engine's silence in ticks of the server's own timer.

    A tick counts at most twice its length, however late it comes: a server that was itself stopped
    or starved finds the engine's frames in the socket, and must not take its own pause for the
    engine's.
    """

    def __init__(self) -> None:
        self._longest_start_s = 0.0
        self._served = False
        self._starting = True
        self._silent_s = 0.0
        self._limit_s = _FIRST_START_S

    @property
    def silent_s(self) -> float:
        """Seconds without progress."""
        return self._silent_s

    def begin(self, *, prepared: bool) -> None:
        """Watch a new process; one that is prepared must answer its configuration at once."""
        self._starting = True
        self._silent_s = 0.0
        self._limit_s = HANG_S if prepared else self._start_limit_s

    def loading(self) -> None:
        """The start goes on."""
        self._longest_start_s = max(self._longest_start_s, self._silent_s)
        self._silent_s = 0.0
        self._limit_s = self._start_limit_s

    def progress(self, allow_s: float = 0.0) -> None:
        """An engine that serves has come further; it may now be silent for ``allow_s``."""
        if self._starting:
            self._longest_start_s = max(self._longest_start_s, self._silent_s)
            self._starting, self._served = False, True
        self._silent_s = 0.0
        self._limit_s = max(HANG_S, allow_s)

    def tick(self, elapsed_s: float, starved_s: float = 0.0) -> bool:
        """Count the time since the last tick; True: the engine is hung.

        ``starved_s`` of the silence the engine would have run, had it been given a core.
        """
        self._silent_s = max(0.0, self._silent_s + min(elapsed_s, 2 * TICK_S) - starved_s)
        return self._silent_s >= self._limit_s

    @property
    def _start_limit_s(self) -> float:
        if not self._served:
            return _FIRST_START_S
        return max(_LATER_START_S, _START_FACTOR * self._longest_start_s)
