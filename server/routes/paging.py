"""The query parameters of lists and streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aiohttp import web

from server.dialects.fields import show
from server.errors import ApiError, invalid
from server.paging import page_of

__all__ = ["cut_page", "query_flag", "query_integer"]

MAX_LIMIT = 100
DEFAULT_LIMIT = 20


def cut_page(http: web.Request, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the list object of the part that ``after``, ``limit`` and ``order`` ask for.

    Raises ApiError 400.
    """
    order = http.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise _wrong("order", order, "'asc' or 'desc'")
    limit = query_integer(http, "limit", least=1, most=MAX_LIMIT)
    page = page_of(
        items,
        after=http.query.get("after"),
        limit=DEFAULT_LIMIT if limit is None else limit,
        newest_first=order == "desc",
    )
    return page.body()


def query_integer(
    http: web.Request, name: str, *, least: int, most: int | None = None
) -> int | None:
    """Read an integer of the query. Raises ApiError 400."""
    text = http.query.get(name)
    if text is None:
        return None
    value = int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None
    if value is None or value < least or (most is not None and value > most):
        wanted = f"an integer of at least {least}" + (f" and at most {most}" if most else "")
        raise _wrong(name, text, wanted)
    return value


def query_flag(http: web.Request, name: str) -> bool:
    """Read true or false of the query; not given is false. Raises ApiError 400."""
    text = http.query.get(name, "false").lower()
    if text not in ("true", "false", "1", "0"):
        raise _wrong(name, text, "'true' or 'false'")
    return text in ("true", "1")


def _wrong(name: str, text: str, wanted: str) -> ApiError:
    return invalid(
        f"Invalid value for '{name}': {show(text)}; it must be {wanted}.",
        param=name,
        code="invalid_value",
    )
