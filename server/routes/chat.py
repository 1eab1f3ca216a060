"""/v1/chat/completions: answer, resume and cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from aiohttp import web

from server.dialects import chat
from server.dialects.chat_answers import ChatCollector, ChatStream
from server.events import Event
from server.request import TurnRequest
from server.routes import projected
from server.routes.bodies import read_json
from server.state import ENGINE, OWNER
from server.transports.sse import Frame

__all__ = ["routes"]


def _stream(_: web.Request, request: TurnRequest) -> Callable[[Event], Iterable[Frame]]:
    asked = chat.ChatRequest(request, request.shape)
    return ChatStream(asked, request.system_fingerprint).feed


def _collector(_: web.Request, request: TurnRequest) -> ChatCollector:
    return ChatCollector(chat.ChatRequest(request, request.shape), request.system_fingerprint)


_DIALECT = projected.Dialect("chat", "chatcmpl", _stream, _collector)


async def create(http: web.Request) -> web.StreamResponse:
    """Answer a conversation, as a stream of chunks or as one object."""
    request = chat.parse(await read_json(http), http.app[ENGINE].info, http[OWNER])
    return await projected.create(http, _DIALECT, request.turn)


async def retrieve(http: web.Request) -> web.StreamResponse:
    """Show an answer again, or the rest of its stream."""
    return await projected.retrieve(http, _DIALECT)


async def cancel(http: web.Request) -> web.Response:
    """End an answer that is being made."""
    return await projected.cancel(http, _DIALECT)


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.post("/v1/chat/completions", create),
        web.get("/v1/chat/completions/{id}", retrieve, allow_head=False),
        web.post("/v1/chat/completions/{id}/cancel", cancel),
    ]
