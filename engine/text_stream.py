"""UTF-8-safe incremental decoding: token ids in, text out, in time linear in the new tokens.

A token is a run of bytes, and a character may be spread over several tokens. The stream keeps only
the bytes of a character that is not complete yet (at most three), so text that was given out never
changes, and the sum of all that was given out is the decoding of the whole.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple

__all__ = ["LeadingSpace", "Piece", "TextStream"]


class LeadingSpace(Enum):
    """What decoding does with the space that encoding put before the first word."""

    KEEP = "keep"
    """Encoding adds none."""
    DROP_ONE = "drop one"
    """The first piece of a text loses one leading space."""
    DROP_EACH = "drop each"
    """Every piece loses one until the text has begun (sentencepiece models that squeeze spaces)."""


class Piece(NamedTuple):
    """One token as bytes. ``droppable``: it begins with a space that LeadingSpace applies to."""

    data: bytes
    droppable: bool


class TextStream:
    """Decodes one answer as it grows.

    Args:
        piece_of: the piece of a token id; an empty one for ids without a piece.
        hidden: ids that give no text.
        leading_space: what happens at the start of the text.
    """

    __slots__ = ("_at_start", "_decoder", "_hidden", "_leading_space", "_piece_of")

    def __init__(
        self,
        piece_of: Callable[[int], Piece],
        hidden: frozenset[int],
        leading_space: LeadingSpace,
    ) -> None:
        self._piece_of = piece_of
        self._hidden = hidden
        self._leading_space = leading_space
        self._at_start = leading_space is not LeadingSpace.KEEP
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that ``ids`` complete; the bytes of an incomplete character are held
        back.
        """
        chunks = []
        for token_id in ids:
            if token_id in self._hidden:
                continue
            piece = self._piece_of(token_id)
            chunks.append(self._begin(piece) if self._at_start else piece.data)
        return self._decoder.decode(b"".join(chunks))

    def finish(self) -> str:
        """End the text: return what is held back, as U+FFFD."""
        return self._decoder.decode(b"", final=True)

    def _begin(self, piece: Piece) -> bytes:
        if not piece.droppable:
            self._at_start = not piece.data
            return piece.data
        rest = piece.data[1:]
        self._at_start = self._leading_space is LeadingSpace.DROP_EACH and not rest
        return rest
