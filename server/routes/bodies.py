"""Reading JSON request bodies and writing JSON answers."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from aiohttp import web

from server.dialects.fields import load_json
from server.errors import ApiError, invalid
from server.state import SETTINGS

__all__ = ["json_response", "read_json"]

_ENCODER = msgspec.json.Encoder()


async def read_json(http: web.Request) -> object:
    """Return a request's parsed body.

    Only bodies that say they are JSON are read: a web page of another origin can send those only
    after asking (CORS), which keeps it from using a server on its reader's own machine.

    Raises ApiError: 415 for another content type, 413 for a body that is too large, 408 for one
    that comes too slowly, 400 for one that is cut short or no JSON.
    """
    if http.content_type != "application/json":
        raise ApiError(
            415,
            f"The Content-Type is {_content_type(http)}; it must be 'application/json'.",
            code="unsupported_media_type",
        )
    patience_s = http.app[SETTINGS].body_timeout_s
    try:
        async with asyncio.timeout(patience_s):
            data = await http.read()
    except TimeoutError:
        raise ApiError(
            408,
            f"The request body did not come within {patience_s:g} s.",
            code="request_timeout",
        ) from None
    except web.HTTPRequestEntityTooLarge as error:
        raise ApiError(
            413,
            f"The request body is larger than {http.client_max_size} bytes.",
            code="request_too_large",
        ) from error
    except (web.HTTPBadRequest, web.RequestPayloadError) as error:
        raise invalid(f"The request body cannot be read: {error}", code="invalid_body") from error
    return load_json(data)


def _content_type(http: web.Request) -> str:
    given = http.headers.get("Content-Type")
    return "missing" if given is None else repr(given[:80])


def json_response(
    data: Any, status: int = 200, headers: Mapping[str, str] | None = None
) -> web.Response:
    """Return ``data`` as a JSON answer; msgspec structs may be anywhere in it."""
    return web.Response(
        body=_ENCODER.encode(data), status=status, headers=headers, content_type="application/json"
    )
