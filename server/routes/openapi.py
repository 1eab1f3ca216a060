"""GET /openapi.json."""

from __future__ import annotations

import msgspec
from aiohttp import web

from server.cli.version import version
from server.openapi.document import document

__all__ = ["routes"]


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    body = msgspec.json.encode(document(version()))

    async def get(_: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    return [web.get("/openapi.json", get)]
