"""The engine process is killed under the server: clients are told, and it comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionChunk

from tests.e2e.live import LiveServer

LONG: dict[str, Any] = {
    "model": "pebble",
    "messages": [{"role": "user", "content": "Hello"}],
    "max_tokens": 3000,
    "extra_body": {"ignore_eos": True},
}


@pytest.fixture
def own_server() -> Iterator[LiveServer]:
    live = LiveServer(["--kv-memory", "64MiB"])
    try:
        yield live
    finally:
        status = live.stop()
    assert status == 0, live.log


def engine_of(server: LiveServer) -> psutil.Process:
    children = psutil.Process(server.pid).children()
    (engine,) = [child for child in children if "engine" in child.cmdline()]
    return engine


async def kill_while_reading(
    stream: openai.AsyncStream[ChatCompletionChunk], server: LiveServer
) -> None:
    killed = False
    async for chunk in stream:
        if not killed and chunk.choices[0].delta.content:
            engine_of(server).kill()
            killed = True


def wait_ready(server: LiveServer) -> None:
    give_up_s = time.monotonic() + 120
    while server.get("/ready")[0] != 200:
        assert time.monotonic() < give_up_s, server.log


async def test_clients_are_told_and_the_engine_comes_back(own_server: LiveServer) -> None:
    async with AsyncOpenAI(
        base_url=f"{own_server.url}/v1", api_key="unused", max_retries=0
    ) as client:
        stream = await client.chat.completions.create(**LONG, stream=True)
        with pytest.raises(openai.APIError, match="engine") as caught:
            await kill_while_reading(stream, own_server)
        assert caught.value.code == "engine_died"
    with OpenAI(base_url=f"{own_server.url}/v1", api_key="unused", max_retries=0) as again:
        wait_ready(own_server)
        answer = again.chat.completions.create(**{**LONG, "max_tokens": 4})
        assert answer.usage is not None
        assert answer.usage.completion_tokens == 4
    samples = own_server.idle_metrics()
    assert samples["millrace_engine_restarts_total"] == 1
    assert samples["millrace_turns_total{dialect=chat,status=failed}"] == 1
    assert "Traceback" not in own_server.log
