"""A server that says what a test wants: the few routes that ``millrace chat`` uses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import WSMsgType, web

KEY = "sesame"
ID = "resp_1"


def created() -> dict[str, Any]:
    return {"type": "response.created", "sequence_number": 0, "response": {"id": ID}}


def delta(number: int, text: str) -> dict[str, Any]:
    return {"type": "response.output_text.delta", "sequence_number": number, "delta": text}


def ended(number: int, how: str = "completed", tokens: int = 3) -> dict[str, Any]:
    response = {"id": ID, "status": how, "usage": {"output_tokens": tokens}}
    return {"type": f"response.{how}", "sequence_number": number, "response": response}


def answer(*texts: str) -> list[dict[str, Any]]:
    """All events of an answer in these pieces."""
    deltas = [delta(number, text) for number, text in enumerate(texts, 1)]
    return [created(), *deltas, ended(len(texts) + 1)]


def calculation(number: int) -> list[dict[str, Any]]:
    """The events of a call that the server ran, from ``number`` on."""
    call = {"type": "function_call", "call_id": "c", "name": "calculator"}
    call["arguments"] = '{"expression": "1 + 1"}'
    output = {"type": "function_call_output", "call_id": "c", "output": '{"result": 2}'}
    return [
        {"type": "response.output_item.done", "sequence_number": number + place, "item": item}
        for place, item in enumerate((call, output))
    ]


class ChatServer:
    """Plays ``script`` (a function of the request) for each question.

    ``None`` in a script hangs up; ``"wait"`` waits until the answer is cancelled.
    """

    def __init__(self) -> None:
        self.script: Callable[[dict[str, Any]], list[Any]] = lambda _: answer("Hi", " there")
        self.stored: list[dict[str, Any]] = []
        """Events for who picks an answer up again."""
        self.asked: list[dict[str, Any]] = []
        self.resumed_after: list[str] = []
        self.num_conversations = 0
        self.cancelled = asyncio.Event()
        self.key: str | None = None
        self.url = ""

    @asynccontextmanager
    async def run(self) -> AsyncIterator[ChatServer]:
        app = web.Application(middlewares=[self._authenticate])
        app.add_routes(
            [
                web.get("/v1/models", self._models),
                web.post("/v1/conversations", self._conversation),
                web.get("/v1/responses", self._socket),
                web.get("/v1/responses/{id}", self._resume),
                web.post("/v1/responses/{id}/cancel", self._cancel),
            ]
        )
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{port}"
        try:
            yield self
        finally:
            await runner.cleanup()

    @web.middleware
    async def _authenticate(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}":
            return web.json_response({"error": {"message": "no"}}, status=401)
        return await handler(request)

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "small"}, {"id": "large"}]})

    async def _conversation(self, http: web.Request) -> web.Response:
        assert await http.json() == {}
        self.num_conversations += 1
        return web.json_response({"id": f"conv_{self.num_conversations}"})

    async def _cancel(self, http: web.Request) -> web.Response:
        assert http.match_info["id"] == ID
        self.cancelled.set()
        return web.json_response({})

    async def _socket(self, http: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(http)
        async for message in socket:
            assert message.type is WSMsgType.TEXT
            request = json.loads(message.data)
            self.asked.append(request)
            for event in self.script(request):
                if event is None:
                    await socket.close()
                    return socket
                if event == "wait":
                    await self.cancelled.wait()
                else:
                    await socket.send_json(event)
        return socket

    async def _resume(self, http: web.Request) -> web.StreamResponse:
        after = http.query["starting_after"]
        self.resumed_after.append(after)
        if not self.stored:
            return web.json_response({"error": {"message": "no such response"}}, status=404)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(http)
        for event in self.stored:
            if event["sequence_number"] > int(after):
                data = f": comment\r\nid: 1\nevent: x\ndata: {json.dumps(event)}\n\n".encode()
                for start in range(0, len(data), 7):
                    await response.write(data[start : start + 7])
        return response
