"""The chat client's way to a server: turns over the WebSocket, the rest over HTTP."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any
from urllib.parse import quote, urlsplit

import aiohttp
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from server.cli.dialogue import Answer, Dialogue, EventLines

__all__ = ["Connection", "ServerAway", "ServerRefused", "check_url"]

_OPEN_TIMEOUT_S = 10.0
_RESUME_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
_MAX_MESSAGE_BYTES = 64 << 20


class ServerAway(Exception):
    """The server cannot be reached."""


class ServerRefused(Exception):
    """The server answered, but does not want this client or this request."""


def check_url(url: str) -> str:
    """Return a server's address without a trailing slash or ``/v1``. Raises ValueError."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{url!r} is not a server's address; write for example http://host:8000")
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


class Connection:
    """One server. The WebSocket is opened when it is needed, and again when it was lost.

    Raises ServerAway and ServerRefused from every call.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = check_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._direct = _is_loopback(urlsplit(url).hostname or "")
        self._clock = clock
        self.on_broken: Callable[[str], None] = lambda _: None
        """Told what goes on while a broken connection is mended."""
        self._socket: ClientConnection | None = None
        self._http: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Close what is open."""
        if self._socket is not None:
            await self._socket.close()
            self._socket = None
        if self._http is not None:
            await self._http.close()
            self._http = None

    async def models(self) -> list[str]:
        """Return the names of the models that the server offers."""
        body = await self._call("GET", "/v1/models")
        return [str(model["id"]) for model in body.get("data", [])]

    async def new_conversation(self) -> str:
        """Create a conversation, which the first question will name; return its id."""
        return str((await self._call("POST", "/v1/conversations", {}))["id"])

    async def cancel(self, response_id: str) -> None:
        """Ask for the end of an answer."""
        await self._call("POST", f"/v1/responses/{quote(response_id, safe='')}/cancel")

    async def ask(self, dialogue: Dialogue, text: str) -> AsyncGenerator[tuple[Answer, str], None]:
        """Send a question; yield its answer after each event with the text that was added.

        When the connection breaks, the answer is picked up where it was.
        """
        answer = Answer(self._clock())
        socket = await self._send(dialogue.request(text))
        try:
            async for message in socket:
                added = answer.feed(_parse(message), self._clock())
                yield answer, added
                if answer.phase.over:
                    return
        except ConnectionClosed:
            pass
        finally:
            if not answer.phase.over:  # what the socket still says is about this answer
                self._socket = None
                await socket.close()
        async for added in self._resume(answer):
            yield answer, added

    async def _send(self, request: dict[str, Any]) -> ClientConnection:
        message = json.dumps(request, ensure_ascii=False)
        if self._socket is not None:
            try:
                await self._socket.send(message)
            except ConnectionClosed:
                self._socket = None
            else:
                return self._socket
        self._socket = await self._open()
        try:
            await self._socket.send(message)
        except ConnectionClosed as error:
            raise ServerAway(f"the server at {self._url} hung up: {error}") from error
        return self._socket

    async def _open(self) -> ClientConnection:
        try:
            return await connect(
                "ws" + self._url.removeprefix("http") + "/v1/responses",
                additional_headers=self._headers,
                compression=None,
                max_size=_MAX_MESSAGE_BYTES,
                open_timeout=_OPEN_TIMEOUT_S,
                proxy=None if self._direct else True,
            )
        except InvalidStatus as error:
            raise _refusal(error.response.status_code, error.response.body or b"") from error
        except InvalidHandshake as error:
            raise ServerRefused(f"no Millrace server at {self._url}: {error}") from error
        except (OSError, TimeoutError) as error:
            raise self._away(error) from error

    async def _resume(self, answer: Answer) -> AsyncGenerator[str, None]:
        """Follow an answer over HTTP, from its last event on."""
        if answer.response_id is None:
            answer.break_off("the connection broke before the server began to answer")
            yield ""
            return
        for delay_s in _RESUME_DELAYS_S:
            if delay_s:
                self.on_broken(f"connection lost; trying again in {delay_s:g} s")
                await asyncio.sleep(delay_s)
            try:
                async for event in self._stored_events(answer):
                    added = answer.feed(event, self._clock())
                    yield added
                    if answer.phase.over:
                        return
            except (OSError, TimeoutError, aiohttp.ClientError):
                continue
            except ServerRefused as error:
                answer.break_off(f"the connection broke and the answer is gone: {error}")
                yield ""
                return
        answer.break_off(f"the connection broke and {self._url} does not come back")
        yield ""

    async def _stored_events(self, answer: Answer) -> AsyncGenerator[dict[str, Any], None]:
        parameters = {"stream": "true", "starting_after": str(answer.last_number or 0)}
        url = f"{self._url}/v1/responses/{quote(answer.response_id or '', safe='')}"
        async with self._session().get(url, params=parameters) as response:
            if response.status != 200:
                raise _refusal(response.status, await response.read())
            lines = EventLines()
            async for chunk in response.content.iter_any():
                for event in lines.feed(chunk):
                    yield event

    async def _call(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        timeout = aiohttp.ClientTimeout(total=_OPEN_TIMEOUT_S)
        try:
            async with self._session().request(
                method, self._url + path, json=body, timeout=timeout
            ) as response:
                content = await response.read()
                if response.status >= 400:
                    raise _refusal(response.status, content)
                return _parse(content)
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            raise self._away(error) from error

    def _session(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_OPEN_TIMEOUT_S),
                trust_env=not self._direct,
            )
        return self._http

    def _away(self, error: BaseException) -> ServerAway:
        if isinstance(error, aiohttp.ClientConnectorError):
            error = error.os_error
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number and number > 0 else str(error)
        if isinstance(error, TimeoutError):
            reason = "it does not answer"
        return ServerAway(f"cannot reach {self._url} ({reason}); is `millrace serve` running?")


def _parse(message: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(message)
    except ValueError as error:
        raise ServerRefused("the server's answer is not JSON; is it a Millrace server?") from error
    return value if isinstance(value, dict) else {}


def _refusal(status: int, body: bytes) -> ServerRefused:
    if status == 401:
        return ServerRefused(
            "the server wants an API key: give --api-key or set MILLRACE_API_KEY (401)"
        )
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = "not a Millrace server?" if status == 404 else "the server gave no reason"
    return ServerRefused(f"{message} ({status})")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
