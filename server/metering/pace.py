"""How fast the engine works, from its own figures."""

from __future__ import annotations

import math

from engine import EngineStats

__all__ = ["Pace"]

_MEMORY_S = 20.0
"""Busy seconds after which a measurement counts a third."""
_ENOUGH_S = 0.2
"""Busy seconds before there is a figure at all."""


class Pace:
    """Tokens a second of the engine's busy time, the latest counting most."""

    def __init__(self) -> None:
        self._last = EngineStats()
        self._tokens = 0.0
        self._busy_s = 0.0

    def update(self, stats: EngineStats) -> None:
        """Take over figures; those of a new engine process begin at 0 again."""
        last = self._last
        if stats.steps < last.steps:
            last = EngineStats()
        busy_s = stats.busy_s - last.busy_s
        tokens = stats.prompt_tokens + stats.generation_tokens
        tokens -= last.prompt_tokens + last.generation_tokens
        self._last = stats
        if busy_s > 0:
            keep = math.exp(-busy_s / _MEMORY_S)
            self._tokens = self._tokens * keep + tokens
            self._busy_s = self._busy_s * keep + busy_s

    @property
    def tokens_per_s(self) -> float | None:
        """Prompt and generated tokens a second; None: not measured yet."""
        if self._busy_s < _ENOUGH_S or self._tokens <= 0:
            return None
        return self._tokens / self._busy_s
