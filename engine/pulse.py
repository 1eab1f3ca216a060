"""The compute loop's own signs of life, from within a step.

A frame a step is enough where steps are short. But one step with a long prompt may take a minute on
a CPU, and whoever waits for its frame cannot tell it from a loop that hangs. A thread that says
"alive" could not either: it would go on while the loop hangs. So it is the loop that speaks, each
time it is done with a piece of a step (a layer, a slice of logits), and it says before how long the
longest piece may take, by what pieces took until now.
"""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pulse"]

_INTERVAL_S = 0.25
"""Pieces that end sooner after the last sign than this give none."""
_SLACK = 8.0
"""A piece may take so many times as long as expected: cores are shared, contexts grow."""
_SHORT_S = 1.0
"""Silence that needs no announcement; the other side allows more than this anyway."""
_FEW_TOKENS = 31
"""Fewer tokens take about as long as this many, for the weights are read all the same, and say
little of what many take. The warm-up's prompt has this many."""
_WEIGHT = 0.2
"""Of the latest piece in the mean."""
_MOST_S = 300.0


class Pulse:
    """Calls ``say(silence_s)`` from within steps: the next sign comes within so many seconds.

    Args:
        say: must not block.
        clock: seconds.
    """

    def __init__(
        self,
        say: Callable[[float], None] = lambda silence_s: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._say = say
        self._clock = clock
        self._num_tokens = _FEW_TOKENS
        self._learns = True
        self._token_s = 0.0
        """What recent pieces took for each token of their step; a mean, so that one interruption
        does not make a hang look normal ever after."""
        self._piece_s = self._said_s = clock()

    def begin(self, num_tokens: int) -> None:
        """A step of so many tokens begins."""
        self._num_tokens = max(num_tokens, _FEW_TOKENS)
        self._learns = num_tokens >= _FEW_TOKENS or not self._token_s
        self._piece_s = now_s = self._clock()
        if self._silence_s > _SHORT_S:
            self._tell(now_s)

    def beat(self) -> None:
        """A piece of the step is done."""
        now_s = self._clock()
        if self._learns:
            token_s = (now_s - self._piece_s) / self._num_tokens
            self._token_s += (token_s - self._token_s) * (_WEIGHT if self._token_s else 1.0)
        self._piece_s = now_s
        if now_s - self._said_s >= _INTERVAL_S:
            self._tell(now_s)

    @property
    def _silence_s(self) -> float:
        return min(_SLACK * self._token_s * self._num_tokens, _MOST_S)

    def _tell(self, now_s: float) -> None:
        self._said_s = now_s
        self._say(self._silence_s)
