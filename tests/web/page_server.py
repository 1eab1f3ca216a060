"""The real server on a scripted engine, in a thread of its own, for tests that drive a browser."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Self, TypeVar

from aiohttp import web

from engine import Request
from server.app import build_app
from server.settings import ServerSettings
from server.store import Store
from tests.server.scripted import START, Script, ScriptedEngine, byte_tokenizer, say
from tests.web.cuttable import Relay

__all__ = ["Gate", "PageServer", "question_of"]

CALL_TIMEOUT_S = 20

T = TypeVar("T")


def question_of(request: Request) -> str:
    """Return the text of the last user message of a prompt that ByteTokenizer rendered."""
    ids = request.prompt_ids
    starts = [index for index, token in enumerate(ids) if token == START]
    last = bytes(ids[starts[-2] + 1 : starts[-1]]).decode()
    return last.removeprefix("user: ").strip()


class Gate(asyncio.Event):
    """Lets a script go on one step at a time, or (set) all at once. For the server's loop only."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = asyncio.Semaphore(0)

    async def wait(self) -> bool:  # type: ignore[override]
        if not self.is_set():
            await self._steps.acquire()
        return True

    def let(self, steps: int) -> None:
        for _ in range(steps):
            self._steps.release()

    def open(self) -> None:
        self.set()
        self._steps.release()


class PageServer:
    """Serves the built page and the API. ``answers`` maps a question to what is answered.

    A question that is not in ``answers`` is answered with "You said: " and itself. Questions that
    are in ``held`` are answered one step at a time, by ``let``.
    """

    def __init__(self, *, api_key_file: Path | None = None, max_model_len: int = 4096) -> None:
        self.answers: dict[str, str | Script] = {}
        self.url = ""
        self.direct_url = ""
        """Reaches the server where ``url``, which may be cut, does not."""
        self._held: dict[str, Gate] = {}
        self._max_model_len = max_model_len
        self._api_key_file = api_key_file
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="page-server")
        self._runner: web.AppRunner
        self._relay: Relay
        self._store: Store
        self.engine: ScriptedEngine

    def __enter__(self) -> Self:
        self._thread.start()
        self.call(self._start())
        return self

    def __exit__(self, *_: object) -> None:
        for gate in self._held.values():
            self.do(gate.open)
        self.call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the server's loop and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(CALL_TIMEOUT_S)

    def do(self, work: Callable[[], object]) -> None:
        """Call a function in the server's loop."""

        async def inside() -> None:
            work()

        self.call(inside())

    def cut(self) -> None:
        """Cut every connection; new ones are taken at once."""
        self.call(self._relay.cut())

    def freeze(self) -> None:
        """Let every open connection hang: nothing comes through, and nobody closes it."""
        self.do(self._relay.freeze)

    def hang(self, hangs: bool) -> None:
        """Let connections to come hang too, or no longer."""
        self.do(lambda: self._relay.hang(hangs))

    def away(self) -> None:
        """Cut every connection and refuse new ones. The server itself goes on."""
        self.call(self._relay.close())

    def back(self) -> None:
        """Take connections again."""
        self.call(self._relay.listen())

    def hold(self, question: str) -> None:
        """Answer ``question`` one step at a time."""

        async def gate() -> Gate:
            return Gate()

        self._held[question] = self.call(gate())

    def let(self, question: str, steps: int) -> None:
        """Let the answer to a held question go on by some steps."""
        self.do(lambda: self._held[question].let(steps))

    def release(self, question: str) -> None:
        """Let the answer to a held question go on to its end."""
        self.do(self._held[question].open)

    def _script(self, request: Request) -> Script:
        question = question_of(request)
        answer = self.answers.get(question, f"You said: {question}")
        script = say(answer, per_step=4) if isinstance(answer, str) else answer
        script.hold = self._held.get(question)
        return script

    async def _start(self) -> None:
        self.engine = ScriptedEngine(self._script, max_model_len=self._max_model_len)
        settings = ServerSettings(port=0, api_key_file=self._api_key_file, drain_s=0)
        self._store = await Store.open()
        app = build_app(settings, self.engine, byte_tokenizer(), self._store)
        self._runner = web.AppRunner(app, shutdown_timeout=1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port = self._runner.addresses[0][1]
        self.direct_url = f"http://127.0.0.1:{port}/"
        self._relay = Relay(port)
        await self._relay.listen()
        self.url = f"http://127.0.0.1:{self._relay.port}/"

    async def _stop(self) -> None:
        await self._relay.close()
        await self._runner.cleanup()
        await self.engine.close()
        await self._store.close()
