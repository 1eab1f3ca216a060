"""A client of Chat Completions that comes back: it goes on by the id of its stream.

It knows no sequence numbers, only the ids that its events had, as any SSE client does. Text that is
the undisturbed answer's to the last character was neither lost nor doubled nor reordered.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import aiohttp
import orjson

from tests.chaos.checker import Verdict
from tests.chaos.client import FIRST_EVENT_S, LOST, RETRY_S, SILENCE_S, frames_of
from tests.chaos.questions import Answer, Question

__all__ = ["ChatClient"]

PATIENCE_S = 60.0


class ChatClient:
    """Asks one question and does not rest until ``[DONE]``."""

    def __init__(
        self, question: Question, answer: Answer, addresses: Sequence[str], *, seed: int
    ) -> None:
        self._question = question
        self._answer = answer
        self._addresses = addresses
        self._rng = random.Random(seed)
        self._address: str | None = None
        self._stream_id: str | None = None
        self._last_id: str | None = None
        self._text = ""
        self._token_ids: list[int] = []
        self._done = False
        self._connections = 0
        self._moves = 0
        self._longest_silence_s = 0.0

    @property
    def verdict(self) -> Verdict:
        """What is to be said of it at its end."""
        faults: Counter[str] = Counter()
        whole = self._text == self._answer.text and tuple(self._token_ids) == self._answer.token_ids
        if self._done and not whole:
            faults["other text"] += 1
        if not self._done:
            faults["silent"] += 1
        ending = "whole" if whole and self._done else "none"
        return Verdict(
            ending=ending,
            faults=faults,
            num_tokens=len(self._token_ids),
            resumed=self._connections > 1,
            moves=self._moves,
        )

    async def run(self) -> None:
        """Ask, and come back after every cut."""
        began_s = time.monotonic()
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0)
        connector = aiohttp.TCPConnector(force_close=True)
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            while not self._done and time.monotonic() - began_s < PATIENCE_S:
                try:
                    await self._connect(session)
                except LOST:
                    await asyncio.sleep(RETRY_S * self._rng.random())

    async def _connect(self, session: aiohttp.ClientSession) -> None:
        address = self._rng.choice(self._addresses)
        self._connections += 1
        self._moves += self._stream_id is not None and address != self._address
        self._address = address
        url = f"{address}/v1/chat/completions"
        if self._stream_id is None:
            request = session.post(url, json=self._body())
        else:
            headers = {} if self._last_id is None else {"Last-Event-ID": self._last_id}
            request = session.get(f"{url}/{self._stream_id}?stream=true", headers=headers)
        async with request as response:
            if response.status != 200:
                raise EOFError(f"refused with {response.status}")
            await self._read(response)

    def _body(self) -> dict[str, Any]:
        question = self._question
        body = question.body(
            stream=True,
            messages=[{"role": "user", "content": question.prompt}],
            max_tokens=question.num_tokens,
            on_disconnect="finish",
        )
        return {name: body[name] for name in body if name not in ("input", "max_output_tokens")}

    async def _read(self, response: aiohttp.ClientResponse) -> None:
        """Take whole events; what a cut left of one is none, and comes again."""
        frames = frames_of(response)
        limit_s = FIRST_EVENT_S
        while not self._done:
            async with asyncio.timeout(limit_s):
                frame = await anext(frames, None)
            if frame is None:
                raise EOFError("the stream ended early")
            limit_s = SILENCE_S
            self._take(frame)

    def _take(self, frame: bytes) -> None:
        for line in frame.split(b"\n"):
            if line == b"data: [DONE]":
                self._done = True
            elif line.startswith(b"id: "):
                self._last_id = line[4:].decode()
            elif line.startswith(b"data: "):
                chunk = orjson.loads(line[6:])
                self._stream_id = chunk["id"]
                for choice in chunk["choices"]:
                    self._text += choice["delta"].get("content") or ""
                    self._token_ids += choice.get("token_ids") or []
