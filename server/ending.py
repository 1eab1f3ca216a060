"""How a turn ended, and the terminal event that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from server.events import Event, ResponseCancelled, ResponseCompleted, ResponseIncomplete
from server.response_object import failed_event

__all__ = ["Ending", "terminal_event"]


class Ending(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """How a turn ended; an ``error`` is (code, message). Stored beside the events it makes."""

    status: str
    error: tuple[str, str] | None = None
    reason: str | None = None
    """Why it is incomplete: "max_output_tokens" or "deadline"."""


def terminal_event(ending: Ending, response: Mapping[str, Any]) -> Event:
    """Return the event that ends a turn with ``response``."""
    if ending.error is not None:
        return failed_event(response, *ending.error)
    kinds = {
        "completed": ResponseCompleted,
        "incomplete": ResponseIncomplete,
        "cancelled": ResponseCancelled,
    }
    return kinds[ending.status](response=dict(response))
