"""/v1/completions: answer, resume and cancel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from aiohttp import web

from server.dialects import completions
from server.dialects.prompts import Decode
from server.events import Event
from server.request import TurnRequest
from server.routes import projected
from server.routes.bodies import read_json
from server.state import ENGINE, OWNER, TOKENIZER
from server.transports.sse import Frame

__all__ = ["routes"]


def _decoder(http: web.Request, request: TurnRequest) -> Decode:
    tokenizer = http.app[TOKENIZER]

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special=request.skip_special_tokens)

    return decode


def _stream(http: web.Request, request: TurnRequest) -> Callable[[Event], Iterable[Frame]]:
    asked = completions.CompletionRequest(request, request.shape)
    decode = _decoder(http, request)
    return completions.CompletionStream(asked, request.system_fingerprint, decode).feed


def _collector(http: web.Request, request: TurnRequest) -> completions.CompletionCollector:
    asked = completions.CompletionRequest(request, request.shape)
    decode = _decoder(http, request)
    return completions.CompletionCollector(asked, request.system_fingerprint, decode)


_DIALECT = projected.Dialect("completions", "cmpl", _stream, _collector)


async def create(http: web.Request) -> web.StreamResponse:
    """Continue one or more prompts, as a stream of chunks or as one object."""
    request = completions.parse(await read_json(http), http.app[ENGINE].info, http[OWNER])
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
        web.post("/v1/completions", create),
        web.get("/v1/completions/{id}", retrieve, allow_head=False),
        web.post("/v1/completions/{id}/cancel", cancel),
    ]
