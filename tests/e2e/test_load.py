"""Many streams at once, a third of them cut: the others notice nothing, and the books balance."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncGenerator, Iterator
from typing import Any, NamedTuple

import aiohttp
import pytest
from websockets.asyncio.client import connect

from tests.e2e.live import LiveServer

NUM_STREAMS = 128
NUM_TOKENS = 48
SEED = 20_260_711

WORDS = (
    "river stone light winter bread horse letter garden music island paper morning".split()  # noqa: SIM905
)


class Stream(NamedTuple):
    """One client."""

    prompt: str
    sampling: dict[str, Any]
    over_websocket: bool
    cut_after: int | None
    """Leaves after so many pieces of text; None: stays."""


class Heard(NamedTuple):
    text: str
    num_pieces: int


@pytest.fixture
def own_server() -> Iterator[LiveServer]:
    """Nobody else has used it, so its counters are all this test's."""
    live = LiveServer(["--kv-memory", "256MiB"])
    try:
        yield live
    finally:
        status = live.stop()
    assert status == 0, live.log


def make_streams() -> list[Stream]:
    rng = random.Random(SEED)
    cut = set(rng.sample(range(NUM_STREAMS), NUM_STREAMS // 3))
    streams = []
    for number in range(NUM_STREAMS):
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 40)))
        greedy = rng.random() < 0.5
        sampling = {"temperature": 0} if greedy else {"temperature": 1, "seed": number}
        streams.append(
            Stream(
                prompt=f"Tell me of {words}.",
                sampling=sampling,
                over_websocket=number % 2 == 1,
                cut_after=rng.randint(1, 20) if number in cut else None,
            )
        )
    return streams


def body_of(stream: Stream) -> dict[str, Any]:
    # One that will be cut would go on for long after: it cannot have ended by itself.
    tokens = NUM_TOKENS if stream.cut_after is None else 2000
    limit = "max_output_tokens" if stream.over_websocket else "max_tokens"
    body = {"model": "pebble", "ignore_eos": True, limit: tokens, **stream.sampling}
    if stream.over_websocket:
        return {**body, "type": "response.create", "input": stream.prompt, "store": False}
    return {**body, "messages": [{"role": "user", "content": stream.prompt}], "stream": True}


async def alone(session: aiohttp.ClientSession, stream: Stream) -> tuple[str, int]:
    """The answer when nobody else asks, and the prompt's length in tokens."""
    body = body_of(stream._replace(over_websocket=False, cut_after=None))
    async with session.post("/v1/chat/completions", json={**body, "stream": False}) as response:
        answer = await response.json()
        assert response.status == 200, answer
        return answer["choices"][0]["message"]["content"], answer["usage"]["prompt_tokens"]


async def sse_pieces(session: aiohttp.ClientSession, stream: Stream) -> AsyncGenerator[str, None]:
    async with session.post("/v1/chat/completions", json=body_of(stream)) as response:
        assert response.status == 200
        async for line in response.content:
            if not line.startswith(b"data: "):
                continue
            data = line.removeprefix(b"data: ").strip()
            if data == b"[DONE]":
                return
            chunk = json.loads(data)
            assert "error" not in chunk, chunk
            if text := chunk["choices"][0]["delta"].get("content"):
                yield text
        raise AssertionError("the stream ended without [DONE]")


async def socket_pieces(url: str, stream: Stream, *, rude: bool) -> AsyncGenerator[str, None]:
    async with connect(url.replace("http", "ws", 1) + "/v1/responses", compression=None) as socket:
        await socket.send(json.dumps(body_of(stream)))
        numbers = []
        try:
            async for message in socket:
                event = json.loads(message)
                numbers.append(event["sequence_number"])
                assert event["type"] not in ("error", "response.failed"), event
                if event["type"] == "response.output_text.delta":
                    yield event["delta"]
                elif event["type"] in ("response.completed", "response.incomplete"):
                    assert numbers == list(range(len(numbers)))
                    return
        finally:
            if rude:
                socket.transport.abort()
        raise AssertionError("the socket closed before the response ended")


async def listen(url: str, session: aiohttp.ClientSession, stream: Stream) -> Heard:
    rude = stream.cut_after is not None and stream.cut_after % 2 == 0
    if stream.over_websocket:
        pieces = socket_pieces(url, stream, rude=rude)
    else:
        pieces = sse_pieces(session, stream)
    text, count = "", 0
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            text += piece
            count += 1
            if count == stream.cut_after:
                break
    return Heard(text, count)


async def test_other_streams_notice_nothing(own_server: LiveServer) -> None:
    streams = make_streams()
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(
        own_server.url, connector=connector, timeout=timeout
    ) as session:
        expected = [await alone(session, stream) for stream in streams]
        before = await asyncio.to_thread(own_server.idle_metrics)
        heard = await asyncio.gather(
            *(listen(own_server.url, session, stream) for stream in streams)
        )
    after = await asyncio.to_thread(own_server.idle_metrics)

    stayed = [number for number, stream in enumerate(streams) if stream.cut_after is None]
    for number, (stream, got, (text, _)) in enumerate(zip(streams, heard, expected, strict=True)):
        if stream.cut_after is None:
            assert got.text == text, f"stream {number} differs"
        else:
            assert text.startswith(got.text) or got.text.startswith(text), number
    check_books(before, after, streams, len(stayed), sum(prompt for _, prompt in expected))
    assert "Traceback" not in own_server.log
    blocked_ms = 1e3 * after["millrace_event_loop_blocked_max_seconds"]
    print(f"longest that the server held its event loop: {blocked_ms:.1f} ms")
    assert blocked_ms < 50


def check_books(
    before: dict[str, float],
    after: dict[str, float],
    streams: list[Stream],
    num_stayed: int,
    prompt_tokens: int,
) -> None:
    def grown(name: str) -> float:
        return after.get(name, 0) - before.get(name, 0)

    def turns(dialect: str, status: str) -> float:
        return grown(f"millrace_turns_total{{dialect={dialect},status={status}}}")

    for dialect, over_websocket in (("chat", False), ("responses", True)):
        own = [stream for stream in streams if stream.over_websocket is over_websocket]
        num_cut = sum(stream.cut_after is not None for stream in own)
        assert turns(dialect, "cancelled") == num_cut
        # All that stayed were ended by their token limit.
        assert turns(dialect, "incomplete") == len(own) - num_cut
        assert turns(dialect, "completed") == turns(dialect, "failed") == 0
        assert grown(f"millrace_turns_started_total{{dialect={dialect}}}") == len(own)
    assert grown("millrace_turn_prompt_tokens_total") == prompt_tokens
    assert grown("millrace_time_to_first_token_seconds_count") == len(streams)
    completion = grown("millrace_turn_completion_tokens_total")
    assert completion >= num_stayed * NUM_TOKENS + (len(streams) - num_stayed)
    assert grown("millrace_generation_tokens_total") >= completion
    # Tokens that came together with an answer's first have no time of their own.
    assert 0 < grown("millrace_inter_token_seconds_count") <= completion - len(streams)
    assert after["millrace_kv_blocks_free"] == after["millrace_kv_blocks"] > 0
