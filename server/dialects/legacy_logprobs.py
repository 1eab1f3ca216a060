"""Log-probabilities as Completions shows them: four parallel arrays, offsets in characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from server.events import TokenLogprob

__all__ = ["LegacyLogprobs"]


def _num_chars(data: Sequence[int]) -> int:
    """How many characters begin in these UTF-8 bytes."""
    return sum(byte & 0xC0 != 0x80 for byte in data)


class LegacyLogprobs:
    """Turns the tokens of one answer into ``logprobs``, piece by piece.

    ``text_offset`` counts in characters from the begin of the choice's text, the echoed prompt
    included. A token that only continues a character has the offset after it.
    """

    def __init__(self) -> None:
        self._offset = 0

    def add(self, entries: Sequence[TokenLogprob | None], first: str = "") -> dict[str, list[Any]]:
        """Return the arrays for the next tokens.

        None among ``entries`` stands for the first token of a prompt, which nothing predicts;
        ``first`` is its text.
        """
        tokens: list[str] = []
        token_logprobs: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for entry in entries:
            offsets.append(self._offset)
            if entry is None:
                tokens.append(first)
                token_logprobs.append(None)
                tops.append(None)
                self._offset += len(first)
                continue
            tokens.append(entry.token)
            token_logprobs.append(entry.logprob)
            tops.append({top.token: top.logprob for top in entry.top_logprobs})
            self._offset += _num_chars(entry.bytes)
        return {
            "tokens": tokens,
            "token_logprobs": token_logprobs,
            "top_logprobs": tops,
            "text_offset": offsets,
        }
