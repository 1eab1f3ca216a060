"""POST /v1/completions."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from server.dialects import completions
from server.dialects.projection import fingerprint
from server.routes.bodies import json_response, read_json
from server.routes.collect import collect
from server.state import ENGINE, OWNER, TOKENIZER, TURNS
from server.transports import sse

__all__ = ["routes"]


async def create(http: web.Request) -> web.StreamResponse:
    """Continue one or more prompts, as a stream of chunks or as one object."""
    info = http.app[ENGINE].info
    tokenizer = http.app[TOKENIZER]
    request = completions.parse(await read_json(http), info, http[OWNER])
    skip_special = request.turn.skip_special_tokens

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.decode(ids, skip_special=skip_special)

    turn = await http.app[TURNS].start(request.turn)
    if request.turn.stream:
        stream = completions.CompletionStream(request, fingerprint(info), decode)
        return await sse.respond(http, turn, stream.feed)
    collector = completions.CompletionCollector(request, fingerprint(info), decode)
    await collect(turn, collector.feed)
    return json_response(collector.result())


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [web.post("/v1/completions", create)]
