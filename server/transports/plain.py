"""Plain HTTP: reading JSON bodies, writing JSON answers, and waiting for a whole turn."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from server.dialects.fields import load_json
from server.errors import ApiError, invalid
from server.events import Event
from server.turn import Turn

__all__ = ["collect", "json_response", "read_json"]

_ENCODER = msgspec.json.Encoder()


async def read_json(request: web.Request) -> object:
    """Read a request's JSON body.

    Only bodies that say they are JSON are read: a web page of another origin can send those only
    after asking (CORS), which keeps it from calling a server on its reader's own machine.

    Raises ApiError: 415 for another content type, 413 for a body that is too large, 400 for one
    that is cut short or no JSON.
    """
    if request.content_type != "application/json":
        given = request.headers.get("Content-Type")
        shown = "missing" if given is None else repr(given[:80])
        raise ApiError(
            415,
            f"The Content-Type is {shown}; it must be 'application/json'.",
            code="unsupported_media_type",
        )
    try:
        data = await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise ApiError(
            413,
            f"The request body is larger than the {request.client_max_size} bytes allowed.",
            code="request_too_large",
        ) from error
    except (web.HTTPBadRequest, web.RequestPayloadError) as error:
        raise invalid(f"The request body cannot be read: {error}", code="invalid_body") from error
    return load_json(data)


def json_response(body: Mapping[str, Any], *, status: int = 200) -> web.Response:
    """Return a JSON answer; msgspec structs may be anywhere in it."""
    return web.Response(body=_ENCODER.encode(body), status=status, content_type="application/json")


async def collect(turn: Turn, feed: Callable[[Event], object]) -> None:
    """Feed all events of a turn; if the client leaves meanwhile, ``turn.detach()`` is called."""
    try:
        async for event in turn.follow():
            feed(event)
    except asyncio.CancelledError:
        turn.detach()
        raise
