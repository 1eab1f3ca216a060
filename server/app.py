"""The aiohttp application: its parts, its routes, and what surrounds every request."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator

from aiohttp import WSCloseCode, web
from aiohttp.typedefs import Handler, Middleware

from engine import Tokenizer
from server.control import Control
from server.crash import log_crash
from server.errors import ApiError, draining
from server.guard.connections import ConnectionLimits, Connections
from server.guard.gate import Gate
from server.guard.keys import KeyRing
from server.guard.limits import Limits
from server.guard.origins import Origins
from server.guard.queue import WaitingTurns
from server.idempotency import Idempotency
from server.journal import JournalLeft
from server.journals import Journals
from server.metering.ledger import Ledger
from server.metering.loopwatch import LoopWatch
from server.metering.metrics import Metrics
from server.metering.pace import Pace
from server.routes import (
    chat,
    completions,
    conversations,
    health,
    models,
    openapi,
    page,
    responses,
    tokens,
)
from server.routes.bodies import json_response
from server.sequence import Engine
from server.sessions import Sessions
from server.settings import ServerSettings
from server.state import (
    CONNECTIONS,
    CONTROL,
    ENGINE,
    GATE,
    IDEMPOTENCY,
    JOURNALS,
    KEYS,
    METRICS,
    OWNER,
    REQUEST_ID,
    SESSIONS,
    SETTINGS,
    SOCKETS,
    STORE,
    TAKEOVER,
    TOKENIZER,
    TURNS,
)
from server.store import Store, StoreError, StoreKind
from server.takeover import Takeover
from server.transports.websocket import KEY_PROTOCOL
from server.turns import Turns

__all__ = ["build_app"]

log = logging.getLogger("millrace.server")
access_log = logging.getLogger("millrace.access")

_MAX_LOGGED_PATH = 120


def build_app(
    settings: ServerSettings,
    engine: Engine,
    tokenizer: Tokenizer,
    store: Store,
    *,
    metrics: Metrics | None = None,
) -> web.Application:
    """Return the application over a running engine and an open store, which stay the caller's.

    Must be called in the event loop that serves it, with handler cancellation on. Raises
    KeyFileError when the key file cannot be used.
    """
    keys = KeyRing.load(settings.api_key_file)
    surroundings = _Surroundings(settings, keys)
    app = web.Application(
        client_max_size=settings.max_body_bytes, middlewares=[surroundings.middleware()]
    )
    app.on_response_prepare.append(surroundings.add_headers)
    _assemble(app, settings, engine, tokenizer, store, keys, metrics or Metrics())
    files = page.PageFiles(settings.page_dir)
    for module in (chat, completions, responses, conversations, models, tokens, health, openapi):
        app.add_routes(module.routes())
    app.add_routes(page.routes(files))
    app.cleanup_ctx.append(_run)

    async def scan(_: web.Application) -> None:
        await files.scan()

    app.on_startup.append(scan)
    app.on_shutdown.append(_close_sockets)
    return app


def _assemble(
    app: web.Application,
    settings: ServerSettings,
    engine: Engine,
    tokenizer: Tokenizer,
    store: Store,
    keys: KeyRing,
    metrics: Metrics,
) -> None:
    journals = Journals(store)
    sessions = Sessions(store, journals, retention_s=settings.retention_s)
    app[SETTINGS] = settings
    app[ENGINE] = engine
    app[TOKENIZER] = tokenizer
    app[STORE] = store
    app[KEYS] = keys
    app[METRICS] = metrics
    app[JOURNALS] = journals
    app[SESSIONS] = sessions
    app[SOCKETS] = set()
    app[CONNECTIONS] = Connections(
        ConnectionLimits(
            max_all=settings.max_connections,
            max_per_address=settings.max_connections_per_address,
            head_timeout_s=settings.head_timeout_s,
            max_unsent_bytes=settings.max_unsent_bytes,
        ),
        metrics,
    )
    app[GATE] = Gate(
        keys,
        Limits(store, Ledger(store, settings.prices)),
        WaitingTurns(
            lambda: engine.stats,
            Pace(),
            max_waiting=settings.max_queue,
            max_wait_s=settings.max_queue_wait_s,
        ),
        metrics,
    )
    turns = app[TURNS] = Turns(
        engine,
        tokenizer,
        journals,
        sessions,
        metrics,
        store,
        gate=app[GATE],
        max_live=settings.max_live_turns,
        retention_s=settings.retention_s,
        unstored_retention_s=settings.unstored_retention_s,
    )
    app[CONTROL] = Control(store, journals, turns)
    app[IDEMPOTENCY] = Idempotency(store, journals.replicas)
    app[TAKEOVER] = Takeover(store, journals, turns, app[METRICS])


async def _run(app: web.Application) -> AsyncIterator[None]:
    """Run what belongs to the application from its start to its cleanup."""
    loop_watch = LoopWatch(app[METRICS])
    await app[JOURNALS].start()
    app[CONTROL].start()
    # A store in this process's memory has no other servers.
    if app[STORE].kind is not StoreKind.MEMORY:
        app[TAKEOVER].start()
    loop_watch.start()
    app[GATE].start(app[TURNS].show_place)
    yield
    await app[TAKEOVER].close()
    await app[TURNS].drain(0.0)
    await app[CONTROL].close()
    app[TURNS].close()
    await app[GATE].close()
    await app[JOURNALS].close()
    loop_watch.stop()


async def _close_sockets(app: web.Application) -> None:
    sockets = app[SOCKETS]
    closes = [
        socket.close(code=WSCloseCode.GOING_AWAY, message=b"The server is shutting down.")
        for socket in sockets
    ]
    await asyncio.gather(*closes)


def _is_api(path: str) -> bool:
    return path.startswith("/v1/") or path in ("/tokenize", "/detokenize")


class _Surroundings:
    """What every request goes through: ids, origins, keys, errors, headers, the access log."""

    def __init__(self, settings: ServerSettings, keys: KeyRing) -> None:
        self._keys = keys
        self._origins = Origins(settings.host, settings.allowed_origins)

    def middleware(self) -> Middleware:
        """Return the middleware."""

        @web.middleware
        async def surround(request: web.Request, handler: Handler) -> web.StreamResponse:
            http = request
            begun_s = time.monotonic()
            http[REQUEST_ID] = f"req_{secrets.token_hex(12)}"
            connections = http.app[CONNECTIONS]
            connections.request_begins(http.protocol)
            status = 499
            try:
                response = await self._answer(http, handler)
                status = response.status
                return response
            finally:
                connections.request_ends(http.protocol)
                access_log.info(
                    "%s %s %d %.1f ms",
                    http.method,
                    http.path[:_MAX_LOGGED_PATH],
                    status,
                    1e3 * (time.monotonic() - begun_s),
                )

        return surround

    async def _answer(self, http: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            if preflight := self._origins.preflight(http):
                return preflight
            self._origins.check(http)
            http[OWNER] = self._authenticate(http) if _is_api(http.path) else ""
            return await handler(http)
        except ApiError as error:
            return _error_response(error)
        except JournalLeft:
            return _error_response(draining())
        except StoreError as error:
            log.error("%s", error)
            unavailable = ApiError(
                503,
                "The store does not answer.",
                kind="server_error",
                code="store_unavailable",
                retry_after_s=5,
            )
            return _error_response(unavailable)
        except web.HTTPException as error:
            if error.status < 400:
                raise
            refused = _translated(http, error)
            if (allowed := error.headers.get("Allow")) is not None:
                refused.headers["Allow"] = allowed
            return _error_response(refused)
        except Exception as error:
            log_crash(log, http[REQUEST_ID], error)
            if http.writer.output_size > 0 and http.transport is not None:
                # Half an answer is out; all that can still be said is that it ends here.
                http.transport.abort()
            return _error_response(
                ApiError(500, "The server failed; see its log.", kind="server_error")
            )

    def _authenticate(self, http: web.Request) -> str:
        authorization = http.headers.get("Authorization")
        key = http.headers.get("api-key")
        if authorization is None and key is None:
            offered = http.headers.get("Sec-WebSocket-Protocol", "").split(",")
            names = (name.strip() for name in offered)
            key = next(
                (name[len(KEY_PROTOCOL) :] for name in names if name.startswith(KEY_PROTOCOL)), None
            )
        return self._keys.owner(authorization, key)

    async def add_headers(self, http: web.Request, response: web.StreamResponse) -> None:
        """Complete the headers of an answer that is about to be sent."""
        headers = response.headers
        headers["X-Content-Type-Options"] = "nosniff"
        if request_id := http.get(REQUEST_ID):
            headers["x-request-id"] = request_id
        if http.method == "POST" and (owner := http.get(OWNER)):
            headers.update(http.app[GATE].headers(owner))
        self._origins.add_headers(http, response)


def _error_response(error: ApiError) -> web.Response:
    headers = dict(error.headers)
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return json_response(error.body(), status=error.status, headers=headers)


def _translated(http: web.Request, error: web.HTTPException) -> ApiError:
    """Return what aiohttp refuses by itself in the API's own shape."""
    path = http.path[:_MAX_LOGGED_PATH]
    if error.status == 404:
        return ApiError(
            404, f"There is nothing at {path}.", kind="not_found_error", code="unknown_url"
        )
    if error.status == 405:
        return ApiError(405, f"{http.method} is not possible at {path}.", code="method_not_allowed")
    if error.status == 413:
        return ApiError(413, "The request body is too large.", code="request_too_large")
    return ApiError(error.status, error.reason)
