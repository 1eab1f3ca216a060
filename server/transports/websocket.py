"""The WebSocket of the Responses API: ``response.create`` in, a turn's events out.

Frames are JSON texts. A client may run several turns at once by giving each ``response.create`` a
``stream_id`` of its own (a lane), which every event of that turn then carries. Without one, and
within one lane, turns run one after the other in the order they were asked for. ``response.cancel``
ends a turn, by ``response_id``, by ``stream_id``, or the one that runs where neither is given.
Whatever is wrong with a message is answered by an ``error`` event, and the connection stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from typing import Any, cast

import msgspec
import orjson
from aiohttp import WSCloseCode, WSMsgType, web

from engine import ModelInfo
from server.crash import log_crash
from server.dialects import responses as dialect
from server.dialects.fields import Fields, load_json, show
from server.errors import ApiError, invalid
from server.journal import Entry, JournalLeft
from server.responding import Items, begin
from server.state import CONTROL, ENGINE, JOURNALS, OWNER, SESSIONS, SETTINGS, SOCKETS, TURNS
from server.store import StoreError
from server.stored_log import is_terminal
from server.turn import Turn
from server.turn_record import decode_view

__all__ = ["KEY_PROTOCOL", "PROTOCOL", "serve"]

log = logging.getLogger("millrace.websocket")

PROTOCOL = "millrace"
KEY_PROTOCOL = "millrace-key."
"""Browsers cannot set headers of a WebSocket: they offer their API key as a subprotocol."""
MAX_QUEUED = 16
"""Turns that may wait in one lane."""
MAX_RECENT = 16
"""Responses with ``store: false`` that a connection remembers for ``previous_response_id``."""


async def serve(http: web.Request) -> web.WebSocketResponse:
    """Serve one connection until it closes; then ``on_disconnect`` of its turns applies."""
    settings = http.app[SETTINGS]
    socket = web.WebSocketResponse(
        protocols=(PROTOCOL,),
        heartbeat=settings.keepalive_s,
        max_msg_size=settings.max_body_bytes,
        # A compressor costs about 100 KiB a connection, and token frames do not shrink.
        compress=False,
    )
    await socket.prepare(http)
    http.app[SOCKETS].add(socket)
    connection = _Connection(http, socket)
    try:
        # Who pings and is gone before the pong leaves no trace in the log.
        with contextlib.suppress(ConnectionResetError):
            async for message in socket:
                if message.type is WSMsgType.TEXT:
                    await connection.receive(message.data)
                elif message.type is WSMsgType.BINARY:
                    text = "Messages must be JSON texts, not binary."
                    await connection.send_error(invalid(text, code="invalid_message"), None)
    finally:
        http.app[SOCKETS].discard(socket)
        await connection.close()
    return socket


class _Lane:
    """Turns of one ``stream_id``, one after the other."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_QUEUED)
        self.task: asyncio.Task[None] | None = None
        self.turn: Turn | None = None


class _Connection:
    """One client's lanes."""

    def __init__(self, http: web.Request, socket: web.WebSocketResponse) -> None:
        self._app = http.app
        self._owner = http[OWNER]
        self._socket = socket
        self._lanes: dict[str | None, _Lane] = {}
        self._recent: OrderedDict[str, Items] = OrderedDict()

    @property
    def _model(self) -> ModelInfo:
        return self._app[ENGINE].info

    async def receive(self, text: str) -> None:
        """Handle one message."""
        stream_id: str | None = None
        try:
            message = load_json(text.encode("utf-8", "surrogatepass"))
            fields = Fields(message)
            stream_id = fields.string("stream_id", empty=False, max_len=64)
            kind = fields.required("type")
            if kind == "response.create":
                self._enqueue(message, stream_id)
            elif kind == "response.cancel":
                await self._cancel(fields, stream_id)
            else:
                raise invalid(
                    f"Invalid value for 'type': {show(kind)}; supported values are: "
                    f"'response.create', 'response.cancel'.",
                    param="type",
                    code="invalid_value",
                )
        except ApiError as error:
            await self.send_error(error, stream_id)
        except StoreError:
            await self.send_error(_store_unavailable(), stream_id)

    async def send_error(self, error: ApiError, stream_id: str | None) -> None:
        """Send an ``error`` event."""
        event: dict[str, Any] = {"type": "error", "status": error.status, **error.body()}
        if stream_id is not None:
            event["stream_id"] = stream_id
        with contextlib.suppress(ConnectionResetError):
            await self._send([orjson.dumps(event)])

    async def close(self) -> None:
        """The client is gone: drop what waits, and leave what runs to its ``on_disconnect``."""
        tasks = [lane.task for lane in self._lanes.values() if lane.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _enqueue(self, message: object, stream_id: str | None) -> None:
        lane = self._lanes.get(stream_id)
        if lane is None:
            limit = self._app[SETTINGS].max_lanes
            if len(self._lanes) >= limit:
                raise ApiError(
                    429,
                    f"The connection has {limit} lanes in use; wait for one to end.",
                    kind="rate_limit_error",
                    code="too_many_lanes",
                    param="stream_id",
                )
            lane = self._lanes[stream_id] = _Lane()
        if lane.queue.full():
            raise ApiError(
                429,
                f"{MAX_QUEUED} responses are waiting already; wait for one to end.",
                kind="rate_limit_error",
                code="too_many_requests",
            )
        lane.queue.put_nowait(cast(dict[str, Any], message))
        if lane.task is None:
            lane.task = asyncio.create_task(self._work(stream_id, lane), name="websocket-lane")

    async def _cancel(self, fields: Fields, stream_id: str | None) -> None:
        response_id = fields.string("response_id", empty=False)
        if response_id is not None:
            turn = self._app[TURNS].get(response_id)
            if turn is None or turn.request.owner != self._owner:
                turn = None
                if await self._elsewhere(response_id):
                    await self._app[CONTROL].ask(response_id)
                    return
        else:
            lane = self._lanes.get(stream_id)
            turn = lane.turn if lane is not None else None
        if turn is None:
            raise ApiError(
                404,
                "There is no running response to cancel.",
                kind="not_found_error",
                code="response_not_found",
                param="response_id",
            )
        turn.stop()

    async def _elsewhere(self, response_id: str) -> bool:
        """Return whether another server makes a response of this client's."""
        data = await self._app[JOURNALS].view(response_id)
        if data is None or decode_view(data).request.owner != self._owner:
            return False
        last = await self._app[JOURNALS].stored.last(response_id)
        return last is not None and not is_terminal(last)

    async def _work(self, stream_id: str | None, lane: _Lane) -> None:
        """Run a lane's turns; the lane is gone when none is left."""
        while not lane.queue.empty():
            body = lane.queue.get_nowait()
            try:
                await self._run(body, stream_id, lane)
            except ApiError as error:
                await self.send_error(error, stream_id)
            except StoreError:
                await self.send_error(_store_unavailable(), stream_id)
            except ConnectionResetError:
                break
            except JournalLeft:
                await self._socket.close(
                    code=WSCloseCode.SERVICE_RESTART, message=b"The answer goes on elsewhere."
                )
                break
            except Exception as error:
                log_crash(log, "a WebSocket's lane", error)
                await self.send_error(_failed(), stream_id)
        del self._lanes[stream_id]

    async def _run(self, body: dict[str, Any], stream_id: str | None, lane: _Lane) -> None:
        rest = {name: value for name, value in body.items() if name not in ("type", "stream_id")}
        # Both mean nothing here: a WebSocket always streams.
        rest.pop("stream", None)
        if rest.pop("background", None):
            raise invalid("'background' is not supported on a WebSocket.", param="background")
        parsed = dialect.parse(rest, self._model)
        turn, items = await begin(
            parsed,
            owner=self._owner,
            turns=self._app[TURNS],
            sessions=self._app[SESSIONS],
            recent=self._recent,
        )
        lane.turn = turn
        complete = False
        try:
            async for batch in turn.batches():
                await self._send([_on_lane(entry, stream_id) for entry in batch])
            complete = True
        finally:
            lane.turn = None
            if not complete:
                turn.detach()
        if not parsed.store:
            self._remember(turn, items)

    def _remember(self, turn: Turn, items: Items) -> None:
        self._recent[turn.id] = [*items, *turn.response["output"]]
        if len(self._recent) > MAX_RECENT:
            self._recent.popitem(last=False)

    async def _send(self, frames: list[bytes]) -> None:
        for frame in frames:
            await self._socket.send_frame(frame, WSMsgType.TEXT)


def _on_lane(entry: Entry, stream_id: str | None) -> bytes:
    if stream_id is None:
        return entry.data
    # The encoder writes an object; its first field goes before the others.
    return b'{"stream_id":%b,%b' % (msgspec.json.encode(stream_id), entry.data[1:])


def _store_unavailable() -> ApiError:
    return ApiError(
        503, "The store does not answer.", kind="server_error", code="store_unavailable"
    )


def _failed() -> ApiError:
    return ApiError(500, "The server failed; see its log.", kind="server_error")
