"""Clients of the Responses API that come back: over SSE and over the WebSocket.

A client that lost its connection goes on after the last event it has, at any of its addresses. One
that has no event yet does not know its response's id and asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Any

import aiohttp
import orjson
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from tests.chaos.history import TERMINAL, History, Note, Received
from tests.chaos.questions import Question

__all__ = ["FIRST_EVENT_S", "LOST", "RETRY_S", "SILENCE_S", "Client", "frames_of"]

FIRST_EVENT_S = 15.0
"""How long to wait for the first event: a turn may have to queue."""
SILENCE_S = 2.0
"""A connection that was silent for so long is left for another."""
RETRY_S = 0.05
FINAL_REFUSALS = frozenset({400, 401, 403, 404, 410})

Watch = Callable[[Received], None]


class _Refused(Exception):
    """An HTTP answer that is no stream."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}")
        self.status = status


LOST = (
    aiohttp.ClientError,
    WebSocketException,
    OSError,
    TimeoutError,
    EOFError,
    asyncio.IncompleteReadError,
)
"""What a connection may end with; the client comes back after each."""


class Client:
    """Asks one question and does not rest until it has its end.

    ``addresses`` are base URLs, one drawn for each connection; ``transport`` is "sse" or
    "websocket"; ``on_event`` sees everything that arrives.
    """

    def __init__(
        self,
        question: Question,
        addresses: Sequence[str],
        *,
        transport: str,
        seed: int,
        patience_s: float = 60.0,
        on_event: Watch | None = None,
    ) -> None:
        self.history = History(question, transport, time.monotonic())
        self._addresses = addresses
        self._rng = random.Random(seed)
        self._patience_s = patience_s
        self._on_event = on_event
        self._address: str | None = None
        self._silent: str | None = None

    async def run(self) -> History:
        """Return the history, with the terminal event, a refusal, or ``gave_up``."""
        history = self.history
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while history.terminal is None and history.refused is None:
                if time.monotonic() - history.began_s > self._patience_s:
                    history.gave_up = True
                    break
                await self._try(session)
        history.ended_s = time.monotonic()
        return history

    async def _try(self, session: aiohttp.ClientSession) -> None:
        history = self.history
        # What said nothing for so long is not asked again at once where there is another.
        addresses = [one for one in self._addresses if one != self._silent] or self._addresses
        address = self._rng.choice(addresses)
        history.connections += 1
        history.moves += history.response_id is not None and address != self._address
        self._address = address
        try:
            async with contextlib.aclosing(self._open(session, address)) as events:
                await self._read(events)
        except _Refused as refusal:
            self._note(f"refused {refusal}")
            if refusal.status in FINAL_REFUSALS:
                history.refused = str(refusal)
            await asyncio.sleep(RETRY_S)
        except LOST as error:
            self._silent = address if isinstance(error, TimeoutError) else None
            self._note(f"lost: {type(error).__name__} {error}")
            await asyncio.sleep(RETRY_S * self._rng.random())

    def _open(
        self, session: aiohttp.ClientSession, address: str
    ) -> AsyncGenerator[dict[str, Any], None]:
        history = self.history
        if history.response_id is not None:
            return _resume(session, address, history.response_id, history.last_number)
        if history.connections > 1:
            self._note("asks again")
        if history.transport == "websocket":
            return _ask_socket(address, history.question)
        return _ask_sse(session, address, history.question)

    async def _read(self, events: AsyncIterator[dict[str, Any]]) -> None:
        """Take events until the terminal one; raises what the connection ended with."""
        history = self.history
        iterator = aiter(events)
        patience_s = FIRST_EVENT_S if history.response_id is None else SILENCE_S
        while True:
            async with asyncio.timeout(patience_s):
                try:
                    event = await anext(iterator)
                except StopAsyncIteration:
                    raise EOFError("the stream ended early") from None
            if event["type"] == "error":
                raise EOFError(f"error event: {event}")
            patience_s = SILENCE_S
            one = Received(time.monotonic(), history.connections, event)
            history.received.append(one)
            if "response" in event:
                history.response_id = event["response"]["id"]
            if self._on_event is not None:
                self._on_event(one)
            if one.kind in TERMINAL:
                return

    def _note(self, what: str) -> None:
        self.history.notes.append(Note(time.monotonic(), what))


async def _ask_sse(
    session: aiohttp.ClientSession, address: str, question: Question
) -> AsyncGenerator[dict[str, Any], None]:
    body = question.body(stream=True)
    async with session.post(f"{address}/v1/responses", json=body) as response:
        async for event in _events(response):
            yield event


async def _resume(
    session: aiohttp.ClientSession, address: str, response_id: str, after: int | None
) -> AsyncGenerator[dict[str, Any], None]:
    headers = {} if after is None else {"Last-Event-ID": str(after)}
    url = f"{address}/v1/responses/{response_id}?stream=true"
    async with session.get(url, headers=headers) as response:
        async for event in _events(response):
            yield event


async def _events(response: aiohttp.ClientResponse) -> AsyncGenerator[dict[str, Any], None]:
    """The events of a text/event-stream; what a cut left of a frame is no event."""
    if response.status != 200:
        try:
            body = await response.json()
            code = str(body["error"]["code"])
        except (ValueError, KeyError, TypeError, aiohttp.ClientError):
            code = "without a code"
        raise _Refused(response.status, code)
    async for frame in frames_of(response):
        for line in frame.split(b"\n"):
            if line.startswith(b"data: "):
                yield orjson.loads(line[6:])


async def frames_of(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """The whole frames of a text/event-stream."""
    buffer = b""
    async for chunk in response.content.iter_any():
        *frames, buffer = (buffer + chunk).split(b"\n\n")
        for frame in frames:
            yield frame


async def _ask_socket(address: str, question: Question) -> AsyncGenerator[dict[str, Any], None]:
    url = address.replace("http", "ws", 1) + "/v1/responses"
    async with connect(url, compression=None, max_size=None, close_timeout=0.2) as socket:
        await socket.send(orjson.dumps(question.body(type="response.create")).decode())
        async for message in socket:
            event = orjson.loads(message)
            if event["type"] == "error":
                raise _Refused(event["status"], str(event["error"]["code"]))
            yield event
