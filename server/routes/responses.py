"""/v1/responses: create, stream, resume, cancel and delete; a WebSocket at the same address."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from aiohttp import web

from server.dialects import responses as dialect
from server.errors import ApiError, invalid, not_found
from server.events import TERMINAL_EVENTS, Event
from server.journal import Entry
from server.journals import JournalNotFound
from server.responding import begin
from server.routes.bodies import json_response, read_json
from server.routes.collect import collect
from server.routes.paging import cut_page, query_flag, query_integer
from server.routes.retried import once
from server.state import CONTROL, ENGINE, JOURNALS, OWNER, SESSIONS, TURNS
from server.transports import sse, websocket

__all__ = ["routes"]


async def create(http: web.Request) -> web.StreamResponse:
    """Make a response: as a stream of events, as one object, or in the background."""
    app = http.app
    parsed = dialect.parse(await read_json(http), app[ENGINE].info)

    async def run(turn_id: str | None) -> web.StreamResponse:
        turn, _ = await begin(
            parsed,
            owner=http[OWNER],
            turns=app[TURNS],
            sessions=app[SESSIONS],
            turn_id=turn_id,
        )
        if parsed.stream:
            return await sse.stream(http, turn.batches(), on_leave=turn.detach)
        if parsed.background:
            return json_response(turn.response)
        last = _Last()
        await collect(turn, last.feed)
        return json_response(last.response())

    async def again(turn_id: str) -> web.StreamResponse:
        if parsed.stream:
            return await _follow(http, turn_id, None)
        if parsed.background:
            return json_response((await app[SESSIONS].response(turn_id, http[OWNER])).response)
        last = _Last()
        await _feed(http, turn_id, last)
        return json_response(last.response())

    return await once(http, run, again)


async def _feed(http: web.Request, turn_id: str, last: _Last) -> None:
    """Wait for the end of a turn that another request began."""
    watch = http.app[CONTROL].watch(turn_id)
    try:
        async for batch in await _batches(http, turn_id, None):
            for entry in batch:
                last.feed(entry.event)
    except BaseException:
        watch.left()
        raise
    finally:
        watch.close()


class _Last:
    """Keeps the terminal event of a turn."""

    def __init__(self) -> None:
        self._event: Event | None = None

    def feed(self, event: Event) -> None:
        if isinstance(event, TERMINAL_EVENTS):
            self._event = event

    def response(self) -> dict[str, Any]:
        """Return the finished response.

        Raises ApiError 400 when the engine refused the request. Other failures are answers: the
        response says ``status: failed`` and why, as OpenAI's does.
        """
        response: dict[str, Any] = getattr(self._event, "response", {})
        error = response.get("error") or {}
        if error.get("code") == "request_refused":
            raise ApiError(400, error["message"], code="request_refused")
        return response


async def retrieve(http: web.Request) -> web.StreamResponse:
    """Return a stored response, or follow its events (``stream=true``).

    A stream begins after the event ``starting_after``, or after the one the header
    ``Last-Event-ID`` names, which wins: it is what the client really has.
    """
    app, response_id = http.app, http.match_info["id"]
    record = await app[SESSIONS].response(response_id, http[OWNER])
    if not query_flag(http, "stream"):
        return json_response(record.response)
    after = query_integer(http, "starting_after", least=0)
    last_id = http.headers.get("Last-Event-ID", "")
    if last_id.isascii() and last_id.isdecimal() and len(last_id) < 16:
        after = int(last_id)
    return await _follow(http, response_id, after)


async def _follow(http: web.Request, turn_id: str, after: int | None) -> web.StreamResponse:
    batches = await _batches(http, turn_id, after)
    watch = http.app[CONTROL].watch(turn_id)
    try:
        return await sse.stream(http, batches, on_leave=watch.left)
    finally:
        watch.close()


async def _batches(
    http: web.Request, turn_id: str, after: int | None
) -> AsyncIterator[list[Entry]]:
    try:
        return await http.app[JOURNALS].follow(turn_id, after)
    except JournalNotFound:
        raise not_found(
            f"The events of '{turn_id}' are no longer stored.", code="events_not_found"
        ) from None


async def cancel(http: web.Request) -> web.Response:
    """End a response, wherever it is being made. One that has ended stays as it is."""
    app, response_id = http.app, http.match_info["id"]
    record = await app[SESSIONS].response(response_id, http[OWNER])
    if record.response["status"] == "in_progress":
        await app[CONTROL].cancel(response_id)
        record = await app[SESSIONS].response(response_id, http[OWNER])
    return json_response(record.response)


async def delete(http: web.Request) -> web.Response:
    """Delete a response and its events; one that is being made is cancelled first."""
    app, response_id = http.app, http.match_info["id"]
    record = await app[SESSIONS].response(response_id, http[OWNER])
    if record.response["status"] == "in_progress":
        await app[CONTROL].cancel(response_id)
    await app[SESSIONS].delete_response(response_id, http[OWNER])
    return json_response({"id": response_id, "object": "response", "deleted": True})


async def input_items(http: web.Request) -> web.Response:
    """List what a response was given."""
    record = await http.app[SESSIONS].response(http.match_info["id"], http[OWNER])
    return json_response(cut_page(http, record.input_items))


async def connect(http: web.Request) -> web.StreamResponse:
    """Serve the WebSocket; a plain GET is told what to do instead."""
    if http.headers.get("Upgrade", "").lower() != "websocket":
        raise ApiError(
            405,
            "GET /v1/responses opens a WebSocket; send a POST to make a response over HTTP.",
            code="method_not_allowed",
        )
    if "Transfer-Encoding" in http.headers or http.headers.get("Content-Length", "0") != "0":
        # Its end is where the frames begin; a proxy in between may see that elsewhere.
        raise invalid("A request that opens a WebSocket has no body.", code="invalid_body")
    return await websocket.serve(http)


def routes() -> list[web.RouteDef]:
    """Return this module's routes."""
    return [
        web.post("/v1/responses", create),
        web.get("/v1/responses", connect, allow_head=False),
        web.get("/v1/responses/{id}", retrieve, allow_head=False),
        web.delete("/v1/responses/{id}", delete),
        web.post("/v1/responses/{id}/cancel", cancel),
        web.get("/v1/responses/{id}/input_items", input_items, allow_head=False),
    ]
