"""Whether held-out text stands in the training text, too.

Three questions by source: is a whole dialogue in both (by a hash of its normalised messages), is an
assistant turn in both, and how many assistant texts share 13 units in a row with anything that the
training text says (units are words, and single characters in Chinese; Brown et al. 2020,
arXiv:2005.14165, appendix C, cleans by 13-grams). Only held-out text is held in memory; training
text passes by.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.train.dialogue import Record

__all__ = ["GRAM_UNITS", "HeldOutIndex", "SourceLeaks", "dialogue_hash", "is_templated"]

GRAM_UNITS = 13
_UNIT = re.compile(r"[㐀-䶿一-鿿豈-﫿]|[^\W㐀-䶿一-鿿豈-﫿]+")
_ODD = np.uint64(0x9E3779B97F4A7C15)
_BATCH_UNITS = 1 << 20

_Hashes = npt.NDArray[np.uint64]

_TEMPLATED = frozenset(("snips", "nlu_eval", "clinc_tools", "clinc_smalltalk", "sgd_summary"))


def is_templated(source: str) -> bool:
    """Whether a program wrote the assistant's part of a source from templates.

    Such a source says the same words in training and held-out text by its nature.
    """
    return source.startswith(("synth_", "made_", "snakes_")) or source in _TEMPLATED


def _digest(text: str) -> bytes:
    return blake2b(text.encode(), digest_size=12).digest()


def _normalised(message: Record) -> str:
    calls = [(c["name"], c["arguments"]) for c in message.get("tool_calls") or []]
    words = " ".join((message.get("content") or "").casefold().split())
    return words + (json.dumps(calls, sort_keys=True, ensure_ascii=False) if calls else "")


def dialogue_hash(record: Record) -> bytes:
    """Of a record's text or messages, whatever their case, white space, system turn and tools."""
    if "text" in record:
        return _digest(" ".join(record["text"].casefold().split()))
    turns = [m for m in record["messages"] if m["role"] != "system"]
    return _digest("\n".join(f"{turn['role']}: {_normalised(turn)}" for turn in turns))


def _assistant_turns(record: Record) -> Iterator[tuple[bytes, str]]:
    """Hash and words of each."""
    if "text" in record:
        yield dialogue_hash(record), record["text"]
    for message in record.get("messages", ()):
        if message["role"] == "assistant":
            yield _digest(_normalised(message)), message.get("content") or ""


def _texts(record: Record) -> Iterator[str]:
    if "text" in record:
        yield record["text"]
    for message in record.get("messages", ()):
        yield message.get("content") or ""


def _units(text: str) -> list[str]:
    return _UNIT.findall(text.casefold())


def _grams(ids: _Hashes) -> _Hashes:
    """The hash of each run of 13 units: [N] -> [N - 12], a polynomial modulo 2**64."""
    count = max(0, len(ids) - GRAM_UNITS + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for offset in range(GRAM_UNITS):
        hashes = hashes * _ODD + ids[offset : offset + count]
    return hashes


@dataclass(slots=True)
class SourceLeaks:
    """What was found for one source."""

    templated: bool
    num_dialogues: int = 0
    num_known_dialogues: int = 0
    """Exactly in the training text."""
    num_turns: int = 0
    """Assistant turns, or whole texts."""
    num_known_turns: int = 0
    """Exactly said by an assistant in the training text."""
    num_long_texts: int = 0
    """Assistant texts of at least 13 units."""
    num_overlapping: int = 0
    """Of these, texts with 13 units in a row that the training text has."""


class HeldOutIndex:
    """The held-out records, to which the training records are shown one by one.

    Args:
        records: of the held-out split.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self._records = list(records)
        self._dialogues = {dialogue_hash(record): False for record in self._records}
        self._turns: dict[bytes, bool] = {}
        self._ids: dict[str, int] = {}
        rng = random.Random(0)
        parts: list[_Hashes] = []
        for record in self._records:
            for key, text in _assistant_turns(record):
                self._turns[key] = False
                units = _units(text)
                for unit in units:
                    if unit not in self._ids:
                        self._ids[unit] = rng.randrange(1, 1 << 64)
                parts.append(_grams(self._to_ids(units)))
        self._grams = np.unique(np.concatenate([np.zeros(0, dtype=np.uint64), *parts]))
        self._gram_known = np.zeros(len(self._grams), dtype=bool)
        self._waiting: list[str] = []

    def _to_ids(self, units: list[str]) -> _Hashes:
        """Random numbers for the units; 0 for one that held-out answers do not have."""
        ids = self._ids
        return np.fromiter((ids.get(unit, 0) for unit in units), dtype=np.uint64, count=len(units))

    def show(self, record: Record) -> None:
        """Looks at one training record."""
        key = dialogue_hash(record)
        if key in self._dialogues:
            self._dialogues[key] = True
        for key, _ in _assistant_turns(record):
            if key in self._turns:
                self._turns[key] = True
        for text in _texts(record):
            self._waiting += _units(text)
            self._waiting.append("")  # no run of units goes from one text to the next
        if len(self._waiting) > _BATCH_UNITS:
            self._match()

    def _match(self) -> None:
        ids = self._to_ids(self._waiting)
        self._waiting.clear()
        foreign = np.concatenate([[0], np.cumsum(ids == 0)])
        whole = foreign[GRAM_UNITS:] == foreign[:-GRAM_UNITS]
        hashes = np.unique(_grams(ids)[whole])
        places = np.searchsorted(self._grams, hashes)
        inside = places < len(self._grams)
        places, hashes = places[inside], hashes[inside]
        self._gram_known[places[self._grams[places] == hashes]] = True

    def by_source(self) -> dict[str, SourceLeaks]:
        """What was found so far."""
        self._match()
        found: dict[str, SourceLeaks] = {}
        for record in self._records:
            source = record["source"]
            leaks = found.setdefault(source, SourceLeaks(is_templated(source)))
            leaks.num_dialogues += 1
            leaks.num_known_dialogues += self.knows(record)
            for key, text in _assistant_turns(record):
                leaks.num_turns += 1
                leaks.num_known_turns += self._turns[key]
                grams = _grams(self._to_ids(_units(text)))
                if len(grams):
                    leaks.num_long_texts += 1
                    places = np.searchsorted(self._grams, grams)
                    leaks.num_overlapping += bool(self._gram_known[places].any())
        return dict(sorted(found.items()))

    def knows(self, record: Record) -> bool:
        """Whether a held-out record is in the training text seen so far, whole and exactly."""
        return self._dialogues[dialogue_hash(record)]

    def known_dialogues(self) -> list[dict[str, Any]]:
        """These held-out records: source, and how what a person (or the text) says begins."""
        found = []
        for record in filter(self.knows, self._records):
            messages = record.get("messages") or [{"role": "user", "content": record.get("text")}]
            said = next((m["content"] for m in messages if m["role"] == "user"), "")
            found.append({"source": record["source"], "begins": said[:100]})
        return found
