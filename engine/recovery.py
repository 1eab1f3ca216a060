"""What the deaths of engine processes came to, and how long to wait before the next start."""

from __future__ import annotations

from engine.types import Recoveries

__all__ = ["RESTART_DELAY_S", "Recovery"]

RESTART_DELAY_S = 0.2
"""Wait before a start that follows a process which brought nothing; doubles each time."""
_MAX_RESTART_DELAY_S = 5.0


class Recovery:
    """Counts deaths. No I/O and no clock.

    Attributes:
        figures: all that is counted.
        died_s: when the engine was last seen alive that has not been replaced yet; None: one
            computes, or has nothing to compute.
    """

    def __init__(self) -> None:
        self.figures = Recoveries()
        self.died_s: float | None = None
        self._barren = 0
        """Processes in a row that brought nothing."""

    def count(self, **added: float) -> None:
        """Add to the figures."""
        self.figures = self.figures.plus(**added)

    @property
    def delay_s(self) -> float:
        """How long to wait before the next start: not at all after a process that worked."""
        if self._barren <= 1:
            return 0.0
        return min(RESTART_DELAY_S * 2.0 ** min(self._barren - 2, 10), _MAX_RESTART_DELAY_S)

    def start_failed(self) -> None:
        """A process did not come so far as to serve."""
        self._barren += 1

    def died(self, alive_s: float) -> bool:
        """A process that served is gone, last seen alive then; True: those before it were well."""
        self._barren += 1
        first = self.died_s is None
        if first:
            self.died_s = alive_s
        return first

    def brought(self) -> None:
        """The living process brought something."""
        self._barren = 0

    def recovered(self, now_s: float) -> float | None:
        """An engine computes again; returns how long its clients waited, if they did."""
        if self.died_s is None:
            return None
        duration_s = now_s - self.died_s
        self.died_s = None
        self.count(recovered=1, recovery_s=duration_s)
        return duration_s
