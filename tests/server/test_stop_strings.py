"""Stop strings: any grouping of the text gives the same answer, and nothing is held needlessly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.parsing.stop_strings import StopStrings

TEXT = st.text("ab<", max_size=30)
STOPS = st.lists(st.text("ab<", min_size=1, max_size=4), min_size=1, max_size=3)


def expected(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """Look at every beginning of the text, as if it came by characters."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(0, 30), max_size=8))
def test_any_grouping(text: str, stops: list[str], include: bool, cuts: list[int]) -> None:
    finder = StopStrings(stops, include=include)
    edges = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    out = ""
    for start, end in itertools.pairwise(edges):
        out += finder.push(text[start:end])
        if finder.matched is None:
            held = text[:end][len(out) :]
            # What is held back could still become a stop string, all of it.
            assert not held or any(stop.startswith(held) for stop in stops)
    out += finder.finish()
    assert (out, finder.matched) == expected(text, stops, include)


def test_nothing_follows_a_match() -> None:
    finder = StopStrings(["x"])
    assert finder.push("axb") == "a"
    assert finder.push("c") == ""
    assert finder.finish() == ""


def test_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        StopStrings([""])
