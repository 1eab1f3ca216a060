"""Finding words in texts: whatever their case, accents or width, and a snippet around the hit."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import msgspec

__all__ = ["Found", "Match", "fold", "search", "words_of"]

MAX_WORDS = 32
BEFORE_CHARS = 40
SNIPPET_CHARS = 160
_ACCENTS = re.compile("[\u0300-\u036f]+")
"""Combining marks of Latin, Greek and Cyrillic; in other scripts marks are letters."""


class Match(NamedTuple):
    """Where words were found: in which item, and the text around."""

    item_id: str
    text: str


class Found(NamedTuple):
    """A conversation has all words; ``match`` is None where only its title has any."""

    match: Match | None


class _Part(msgspec.Struct, frozen=True):
    text: str = ""


class _Item(msgspec.Struct, frozen=True):
    id: str
    type: str = ""
    content: list[_Part] | None = None


_decode = msgspec.json.Decoder(_Item).decode


def fold(text: str) -> str:
    """Return ``text`` so that what people take for the same is the same (NFKD, case folded)."""
    if text.isascii():
        return text.lower()
    # Decomposing brings forth capitals (ℌ), and folding their case marks (İ).
    folded = unicodedata.normalize("NFKD", text).casefold()
    return _ACCENTS.sub("", unicodedata.normalize("NFKD", folded))


def words_of(query: str) -> list[str]:
    """Return the words that are looked for, folded, each once; the longest first."""
    return sorted(dict.fromkeys(fold(query).split()), key=len, reverse=True)[:MAX_WORDS]


def search(words: Sequence[str], title: str | None, items: Iterable[msgspec.Raw]) -> Found | None:
    """Look for words in a conversation: in its title and in the text of its messages.

    Every word must be in one of them. The match is in the first message with the most words.
    """
    in_title = fold(title or "")
    missing = {word for word in words if word not in in_title}
    best: tuple[int, str, str] = (0, "", "")
    for raw in items:
        item = _decode(raw)
        if item.type != "message":
            continue
        text = "\n".join(part.text for part in item.content or ())
        folded = fold(text)
        here = [word for word in words if word in folded]
        missing.difference_update(here)
        if len(here) > best[0]:
            best = len(here), item.id, text
        if len(here) == len(words):
            break
    if missing:
        return None
    count, item_id, text = best
    return Found(Match(item_id, _snippet(words, text)) if count else None)


def _snippet(words: Sequence[str], text: str) -> str:
    """Return the text around the first word that is in it, cut between words."""
    folded = fold(text)
    at = min(place for word in words if (place := folded.find(word)) >= 0)
    start = max(0, _unfolded(text, at) - BEFORE_CHARS)
    end = start + SNIPPET_CHARS
    shown = text[start:end]
    if start and (cut := re.search(r"\s", shown[: BEFORE_CHARS // 2])):
        shown = shown[cut.end() :]
    if end < len(text) and (space := re.search(r"\s\S{0,19}$", shown)):
        shown = shown[: space.start()]
    shown = " ".join(shown.split())
    return ("…" if start else "") + shown + ("…" if end < len(text) else "")


def _unfolded(text: str, at: int) -> int:
    """Return where the character lies whose folded form has the offset ``at``."""
    if text.isascii():
        return at
    ends = range(len(text))
    return bisect_right(ends, at, key=lambda end: len(fold(text[:end]))) - 1
