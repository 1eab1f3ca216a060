"""What a conversation is called when nobody has named it: how its first question begins."""

from __future__ import annotations

from collections.abc import Iterable

from server.paging import Item

__all__ = ["MAX_MADE_CHARS", "MAX_TITLE_CHARS", "title_of"]

MAX_TITLE_CHARS = 200
"""Of a title that a client gives."""
MAX_MADE_CHARS = 60
"""Of one that is made, the mark of its cut included."""


def title_of(items: Iterable[Item]) -> str | None:
    """Return a title made from the first message of the user that says anything.

    It is the first line that is not blank, white space folded, cut between words where it is long.
    """
    for item in items:
        if item.get("type") == "message" and item.get("role") == "user":
            for part in item["content"]:
                for line in part["text"].splitlines():
                    if words := line.split():
                        return _cut(words)
    return None


def _cut(words: list[str]) -> str:
    line = " ".join(words)
    if len(line) <= MAX_MADE_CHARS:
        return line
    cut = line[:MAX_MADE_CHARS]
    # Only a word that is long itself, or a script without spaces, is cut inside.
    end = cut.rfind(" ")
    return (cut[:end] if end > 0 else cut[:-1]) + "…"
