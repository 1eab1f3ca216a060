"""Lists of items, a page at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from server.errors import invalid

__all__ = ["Item", "Page", "page_of"]

Item = dict[str, Any]
"""An item of the Responses API; it has an ``id``."""


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """Part of a list of items."""

    items: list[Item]
    has_more: bool

    def body(self) -> dict[str, Any]:
        """Return the API's list object."""
        return {
            "object": "list",
            "data": self.items,
            "first_id": self.items[0]["id"] if self.items else None,
            "last_id": self.items[-1]["id"] if self.items else None,
            "has_more": self.has_more,
        }


def page_of(items: Sequence[Item], *, after: str | None, limit: int, newest_first: bool) -> Page:
    """Cut a page out of items that are in order. Raises ApiError 400 when ``after`` is not one."""
    ordered = list(reversed(items)) if newest_first else list(items)
    start = 0
    if after is not None:
        ids = [item["id"] for item in ordered]
        if after not in ids:
            raise invalid(f"There is no item '{after}' in this list.", param="after")
        start = ids.index(after) + 1
    return Page(items=ordered[start : start + limit], has_more=len(ordered) > start + limit)
