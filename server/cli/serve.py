"""``millrace serve``: from settings to a listening server, and back to nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from rich.console import Console

from engine import EngineClient, EngineConfig, EngineError, Tokenizer, resolve_model
from server.cli.progress import Progress
from server.guard.keys import KeyRing
from server.settings import ServerSettings

if TYPE_CHECKING:
    from aiohttp import web

    from server.store import Store

__all__ = ["StartError", "bind", "serve"]

log = logging.getLogger("millrace.server")

_INTERRUPTED = 130
_CLOSE_S = 1.0
"""How long open connections may take to close when no turn runs any more."""


class StartError(Exception):
    """The server cannot start; the text is for the person who started it."""


class _Parts(NamedTuple):
    """What an application is made of, all running."""

    engine: EngineClient
    tokenizer: Tokenizer
    store: Store


def bind(host: str, port: int) -> list[socket.socket]:
    """Take the address before anything slow happens; the sockets do not listen yet.

    Port 0 takes a free one. Raises StartError when the address is taken or is not this machine's.
    """
    try:
        found = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise StartError(f"the host {host!r} is not known: {error.strerror}") from error
    sockets: list[socket.socket] = []
    try:
        for family, kind, protocol, _, address in dict.fromkeys(found):
            one = socket.socket(family, kind, protocol)
            sockets.append(one)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            one.bind((address[0], port, *address[2:]))
            port = port or one.getsockname()[1]
    except OSError as error:
        for one in sockets:
            one.close()
        reason = error.strerror or str(error)
        raise StartError(f"cannot listen on {host} port {port}: {reason}") from error
    return sockets


def serve(settings: ServerSettings, config: EngineConfig) -> int:
    """Run the server until a signal ends it; return the exit status.

    The first SIGINT or SIGTERM lets running answers end (``settings.drain_s``), the second waits
    no longer. Raises StartError.
    """
    try:
        KeyRing.load(settings.api_key_file)
    except EngineError as error:
        raise StartError(str(error)) from error
    sockets = bind(settings.host, settings.port)
    try:
        return asyncio.run(_Server(settings, config, sockets).run())
    finally:
        for one in sockets:
            one.close()


class _Server:
    """One run: STARTING until the banner, then serving until the first signal, then draining."""

    def __init__(
        self, settings: ServerSettings, config: EngineConfig, sockets: list[socket.socket]
    ) -> None:
        self._settings = settings
        self._config = config
        self._sockets = sockets
        self._stop = asyncio.Event()
        self._hurry = asyncio.Event()

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for one in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(one, self._on_signal)
        async with contextlib.AsyncExitStack() as stack:
            app = await self._start_or_leave(stack)
            if app is not None:
                await self._stop.wait()
                await self._drain(app)
        if app is None:
            # A download goes on in its thread, which the interpreter would wait for.
            sys.stderr.flush()
            os._exit(_INTERRUPTED)
        return 0

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._hurry.set()
        self._stop.set()

    async def _start_or_leave(self, stack: contextlib.AsyncExitStack) -> web.Application | None:
        """Return the application once it is served, None when a signal came before."""
        start = asyncio.create_task(self._start(stack))
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({start, stop}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if start.done():
            return start.result()
        start.cancel()
        await asyncio.wait({start})
        return None

    async def _start(self, stack: contextlib.AsyncExitStack) -> web.Application:
        try:
            parts = await self._assemble(stack)
            app = await self._listen(stack, parts)
        except (EngineError, OSError, ValueError) as error:
            raise StartError(str(error)) from error
        from server.cli.banner import banner

        print(
            banner(
                self._settings,
                self._sockets[0].getsockname()[:2],
                parts.engine.info,
                parts.store.kind,
                parts.store.where,
            ),
            flush=True,
        )
        return app

    async def _assemble(self, stack: contextlib.AsyncExitStack) -> _Parts:
        """Start the engine's process first and do everything else while it loads."""
        with Progress(Console(stderr=True, soft_wrap=True)) as progress:
            name = self._config.model
            folder = await asyncio.to_thread(resolve_model, name, progress.update)
            served = self._config.served_name or _served_name(name, folder.name)
            config = msgspec.structs.replace(self._config, model=str(folder), served_name=served)
            engine_start = asyncio.create_task(
                EngineClient.start(config, on_progress=progress.update)
            )
            stack.push_async_callback(_end_engine, engine_start)
            rest = asyncio.create_task(self._open_rest(stack, folder))
            try:
                done, _ = await asyncio.wait(
                    {engine_start, rest}, return_when=asyncio.FIRST_EXCEPTION
                )
                for task in done:
                    task.result()
            finally:
                rest.cancel()
                await asyncio.wait({rest})
            tokenizer, store = rest.result()
        return _Parts(engine_start.result(), tokenizer, store)

    async def _open_rest(
        self, stack: contextlib.AsyncExitStack, folder: Path
    ) -> tuple[Tokenizer, Store]:
        tokenizer = await asyncio.to_thread(Tokenizer.load, folder)
        stack.callback(tokenizer.close)
        await asyncio.to_thread(importlib.import_module, "server.app")
        from server.store import Store, StoreError

        try:
            store = await Store.open(self._settings.redis_url)
        except StoreError as error:
            raise StartError(str(error)) from error
        stack.push_async_callback(store.close)
        return tokenizer, store

    async def _listen(self, stack: contextlib.AsyncExitStack, parts: _Parts) -> web.Application:
        from aiohttp import web

        from server.app import build_app
        from server.guard.noise import http_logger
        from server.state import CONNECTIONS

        app = build_app(self._settings, parts.engine, parts.tokenizer, parts.store)
        runner = web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            logger=http_logger(),
            shutdown_timeout=_CLOSE_S,
        )
        # What was loaded so far stays: a full collection that walks it holds the event loop for
        # 70 ms and more.
        gc.collect()
        gc.freeze()
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        for server in await app[CONNECTIONS].listen(runner, self._sockets):
            stack.callback(server.close)
        return app

    async def _drain(self, app: web.Application) -> None:
        """Let running turns end; the port stays open, so that their readers can come back."""
        from server.state import TURNS

        turns = app[TURNS]
        if turns.live:
            log.warning(
                "stopping: %d running answers have %g s to end (again Ctrl-C to wait no longer)",
                turns.live,
                self._settings.drain_s,
            )
        drain = asyncio.create_task(turns.drain(self._settings.drain_s))
        hurry = asyncio.create_task(self._hurry.wait())
        await asyncio.wait({drain, hurry}, return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not drain.done():
            drain.cancel()
            await turns.drain(0.0)


async def _end_engine(start: asyncio.Task[EngineClient]) -> None:
    if not start.done():
        start.cancel()
        await asyncio.wait({start})
    if not start.cancelled() and start.exception() is None:
        await start.result().close()


def _served_name(model: str, folder: str) -> str:
    """The last part of a hub name (its folder is named by a commit), else the folder's name."""
    if os.path.isdir(os.path.expanduser(model)):
        return folder
    return model.partition("@")[0].rpartition("/")[2]
