"""POST /v1/chat/completions."""

from __future__ import annotations

from aiohttp import web

from server.dialects import chat
from server.dialects.chat_answers import ChatCollector, ChatStream
from server.dialects.projection import fingerprint
from server.routes.bodies import json_response, read_json
from server.routes.collect import collect
from server.state import ENGINE, OWNER, TURNS
from server.transports import sse

__all__ = ["routes"]


async def create(http: web.Request) -> web.StreamResponse:
    """Answer a conversation, as a stream of chunks or as one object."""
    info = http.app[ENGINE].info
    request = chat.parse(await read_json(http), info, http[OWNER])
    turn = await http.app[TURNS].start(request.turn)
    if request.turn.stream:
        return await sse.respond(http, turn, ChatStream(request, fingerprint(info)).feed)
    collector = ChatCollector(request, fingerprint(info))
    await collect(turn, collector.feed)
    return json_response(collector.result())


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/v1/chat/completions", create)]
