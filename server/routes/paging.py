"""The query parameters of lists and streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

from aiohttp import web

from server.dialects.fields import show
from server.errors import ApiError, invalid
from server.paging import page_of

__all__ = ["PageQuery", "cut_page", "page_query", "query_flag", "query_integer"]

MAX_LIMIT = 100
DEFAULT_LIMIT = 20


class PageQuery(TypedDict):
    """Which part of a list is asked for."""

    after: str | None
    limit: int
    newest_first: bool


def cut_page(http: web.Request, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the list object of the part that is asked for. Raises ApiError 400."""
    return page_of(items, **page_query(http)).body()


def page_query(http: web.Request) -> PageQuery:
    """Read ``after``, ``limit`` and ``order``. Raises ApiError 400."""
    order = http.query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise _wrong("order", order, "'asc' or 'desc'")
    limit = query_integer(http, "limit", least=1, most=MAX_LIMIT)
    return {
        "after": http.query.get("after"),
        "limit": DEFAULT_LIMIT if limit is None else limit,
        "newest_first": order == "desc",
    }


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
