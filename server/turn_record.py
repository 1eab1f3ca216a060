"""What is stored beside a turn's log, so that another server can show it or go on with it.

``TurnView`` lives as long as the log: whose turn it is and how its dialect shows it. ``TurnWork``
lives while the turn runs and holds the prompt. ``Generated``, ``Answered`` and ``Ending`` are the
journal's notes: given to a new ``Turn`` in their order, they bring it to the state that the log
tells of.
"""

from __future__ import annotations

from typing import Any

import msgspec

from engine import Delta
from server.ending import Ending
from server.journal import Kept
from server.request import TurnRequest

__all__ = [
    "Answered",
    "Generated",
    "TurnView",
    "TurnWork",
    "decode_notes",
    "decode_view",
    "decode_work",
    "keep",
]


class TurnView(msgspec.Struct, frozen=True, kw_only=True):
    """A turn without what was asked."""

    request: TurnRequest
    """Its prompt (unless it is echoed) and its input are left out."""


class TurnWork(msgspec.Struct, frozen=True, kw_only=True):
    """All that a turn began with."""

    request: TurnRequest
    prompts: list[list[int]]
    """Token ids."""
    seed: int
    """The one that was asked for, or drawn."""
    created_at: int


class Generated(msgspec.Struct, frozen=True, array_like=True, tag=0):
    """What the engine sent for one of the turn's sequences."""

    number: int
    delta: Delta


class Answered(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """What the server's own tools said to the calls of a round."""

    items: list[dict[str, Any]]


_encode = msgspec.msgpack.Encoder().encode
decode_view = msgspec.msgpack.Decoder(TurnView).decode
decode_work = msgspec.msgpack.Decoder(TurnWork).decode
decode_notes = msgspec.msgpack.Decoder(list[Generated | Ending | Answered]).decode


def keep(work: TurnWork) -> Kept:
    """Return what the journal stores of a turn."""
    request = msgspec.structs.replace(
        work.request,
        messages=None,
        # An echo shows the prompt as it was given: there it is part of the answer.
        prompts=work.request.prompts if work.request.echo else None,
        input_items=[],
        response_fields={},
    )
    return Kept(view=_encode(TurnView(request=request)), work=_encode(work))
