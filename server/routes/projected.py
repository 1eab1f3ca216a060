"""Chat Completions and Completions over HTTP: answering, resuming, cancelling, for both alike."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

import msgspec
from aiohttp import web

from server.dialects.positions import (
    START,
    Placed,
    Position,
    read_position,
    stream_id_of,
    turn_id_of,
)
from server.dialects.projection import as_cut, fingerprint
from server.errors import ApiError, invalid, not_found
from server.events import Event
from server.journals import JournalNotFound
from server.request import TurnRequest
from server.routes.bodies import json_response
from server.routes.collect import collect
from server.routes.paging import query_flag, query_integer
from server.routes.retried import once
from server.state import CONTROL, ENGINE, JOURNALS, OWNER, TURNS
from server.transports import sse
from server.transports.sse import Frame
from server.turn_record import decode_view

__all__ = ["Dialect", "cancel", "create", "retrieve"]


class Collector(Protocol):
    """Gathers a turn's events into one answer."""

    def feed(self, event: Event) -> None:
        """Take in one event."""

    def result(self) -> dict[str, Any]:
        """Return the answer's body. Raises ApiError when the turn failed."""


class Dialect(NamedTuple):
    """A dialect whose answers are projections of the event log."""

    name: str
    """As in ``TurnRequest.dialect``."""
    prefix: str
    """What its ids begin with."""
    stream: Callable[[web.Request, TurnRequest], Callable[[Event], Iterable[Frame]]]
    collector: Callable[[web.Request, TurnRequest], Collector]


async def create(http: web.Request, dialect: Dialect, request: TurnRequest) -> web.StreamResponse:
    """Run a turn and answer with it, as a stream or whole."""
    request = msgspec.structs.replace(
        request, system_fingerprint=fingerprint(http.app[ENGINE].info)
    )

    async def run(turn_id: str | None) -> web.StreamResponse:
        asked = msgspec.structs.replace(request, turn_id=turn_id)
        turn = await http.app[TURNS].start(asked)
        if request.stream:
            placed = Placed(dialect.stream(http, request), stream_id_of(dialect.prefix, turn.id))
            return await sse.respond(http, turn, placed.feed)
        collector = dialect.collector(http, request)
        await collect(turn, collector.feed)
        return json_response(collector.result())

    async def again(turn_id: str) -> web.StreamResponse:
        return await _show(http, dialect, turn_id, START if request.stream else None)

    return await once(http, run, again)


async def retrieve(http: web.Request, dialect: Dialect) -> web.StreamResponse:
    """Show a turn again: the rest of its stream (``stream=true``), or the whole answer.

    A stream goes on after the header ``Last-Event-ID``, else after the event ``starting_after``,
    on any server of the cluster; the whole answer is waited for.
    """
    stream_id = http.match_info["id"]
    turn_id = _turn_id(dialect, stream_id)
    position = None
    if query_flag(http, "stream"):
        after = query_integer(http, "starting_after", least=0)
        position = START if after is None else Position(after + 1)
        if last_id := http.headers.get("Last-Event-ID"):
            found = read_position(last_id, stream_id)
            if found is None:
                raise invalid(
                    f"The header Last-Event-ID does not name an event of '{stream_id}'; send the "
                    f"id of the last event that was received.",
                    param="Last-Event-ID",
                    code="invalid_value",
                )
            position = found
    return await _show(http, dialect, turn_id, position)


async def cancel(http: web.Request, dialect: Dialect) -> web.Response:
    """End a turn wherever it runs, and return the answer as far as it came. Idempotent."""
    turn_id = _turn_id(dialect, http.match_info["id"])
    request = await _request(http, dialect, turn_id)
    await http.app[CONTROL].cancel(turn_id)
    collector = dialect.collector(http, request)
    status = ""
    try:
        async for batch in await http.app[JOURNALS].follow(turn_id):
            for entry in batch:
                status = getattr(entry.event, "response", {}).get("status", status)
                collector.feed(as_cut(entry.event))
    except JournalNotFound:
        raise _not_found(dialect, turn_id) from None
    return json_response({**collector.result(), "status": status})


async def _show(
    http: web.Request, dialect: Dialect, turn_id: str, begin: Position | None
) -> web.StreamResponse:
    """Send a turn's stream from a place on, or (None) its whole answer."""
    request = await _request(http, dialect, turn_id)
    try:
        # From the beginning always: what a frame says may depend on all events before it.
        batches = await http.app[JOURNALS].follow(turn_id)
    except JournalNotFound:
        raise _not_found(dialect, turn_id) from None
    watch = http.app[CONTROL].watch(turn_id)
    try:
        if begin is not None:
            stream_id = stream_id_of(dialect.prefix, turn_id)
            placed = Placed(dialect.stream(http, request), stream_id, begin)
            return await sse.project(http, batches, placed.feed, on_leave=watch.left)
        collector = dialect.collector(http, request)
        try:
            async for batch in batches:
                for entry in batch:
                    collector.feed(entry.event)
        except BaseException:
            watch.left()
            raise
        return json_response(collector.result())
    finally:
        watch.close()


async def _request(http: web.Request, dialect: Dialect, turn_id: str) -> TurnRequest:
    """Return what a turn was asked, without its prompt. Raises ApiError 404."""
    data = await http.app[JOURNALS].view(turn_id)
    request = decode_view(data).request if data is not None else None
    if request is None or request.owner != http[OWNER] or request.dialect != dialect.name:
        raise _not_found(dialect, turn_id)
    return request


def _turn_id(dialect: Dialect, stream_id: str) -> str:
    turn_id = turn_id_of(dialect.prefix, stream_id)
    if turn_id is None:
        raise _missing(stream_id)
    return turn_id


def _not_found(dialect: Dialect, turn_id: str) -> ApiError:
    return _missing(stream_id_of(dialect.prefix, turn_id))


def _missing(stream_id: str) -> ApiError:
    return not_found(
        f"There is no '{stream_id[:80]}', or it is no longer kept.", code="completion_not_found"
    )
