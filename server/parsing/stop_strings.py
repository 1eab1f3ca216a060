"""Stop strings in text that arrives bit by bit: only what may begin one is held back."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """Finds the first of some strings in growing text.

    The text before the first match is the answer, and with ``include`` the match too. Of several
    that match, the one that ends first wins, and of those the longest. ``matched`` is the string
    that was found.
    """

    __slots__ = ("_held", "_include", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        if not all(stops):
            raise ValueError("a stop string is empty; it must have at least one character")
        self._stops = tuple(sorted(set(stops), key=len, reverse=True))
        self._longest = max(map(len, self._stops), default=0)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Add text; return what can no longer become part of a stop string."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        if match := self._first_match(pending):
            start, self.matched = match
            self._held = ""
            return pending[: start + len(self.matched)] if self._include else pending[:start]
        keep = self._num_held(pending)
        self._held = pending[len(pending) - keep :]
        return pending[: len(pending) - keep]

    def finish(self) -> str:
        """End the text: return what was held back."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, str] | None:
        """Return start and string of the match that ends first: as if text came by characters."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            # Longest first, so an equal end keeps the longer match.
            if start >= 0 and (best is None or start + len(stop) < best[0]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _num_held(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0
