"""The engine process is killed and stopped under the server: clients see nothing but a pause."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from openai import AsyncOpenAI

from tests.e2e.live import LiveServer

NUM_STREAMS = 4
NUM_TOKENS = 500


@pytest.fixture(scope="module")
def own_server() -> Iterator[LiveServer]:
    live = LiveServer(["--kv-memory", "64MiB"])
    try:
        yield live
    finally:
        status = live.stop()
    assert status == 0, live.log
    assert "Traceback" not in live.log


def engine_of(server: LiveServer) -> psutil.Process | None:
    """The engine that serves; None while there is none. What it is forked from has another name."""
    for child in psutil.Process(server.pid).children(recursive=True):
        try:
            if child.name() == "millrace-engine" and child.status() != psutil.STATUS_ZOMBIE:
                return child
        except psutil.NoSuchProcess:
            continue
    return None


@dataclass
class Nemesis:
    """Hurts the engine each time the streams together have come so many chunks further."""

    server: LiveServer
    how: signal.Signals
    times: int
    every: int
    done: int = 0
    seen: int = 0
    hurt: set[int] = field(default_factory=set)

    def see_chunk(self) -> None:
        self.seen += 1
        if self.done < self.times and self.seen >= self.every * (self.done + 1):
            engine = engine_of(self.server)
            if engine is not None and engine.pid not in self.hurt:
                self.hurt.add(engine.pid)
                self.done += 1
                engine.send_signal(self.how)


@dataclass
class Answer:
    """What a client saw of one stream."""

    text: str = ""
    finish_reason: str | None = None
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


async def read(server: LiveServer, index: int, nemesis: Nemesis | None) -> Answer:
    options: dict[str, Any] = {
        "model": "pebble",
        "messages": [{"role": "user", "content": f"Tell me about number {index}."}],
        "max_tokens": NUM_TOKENS,
        "seed": index,
        "temperature": 0.0 if index == 0 else 1.0,
        "frequency_penalty": 0.3 * index,
        "extra_body": {"ignore_eos": True},
        "stream_options": {"include_usage": True},
    }
    answer = Answer()
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        async for chunk in await client.chat.completions.create(**options, stream=True):
            if chunk.usage is not None:
                answer.completion_tokens = chunk.usage.completion_tokens
                answer.prompt_tokens = chunk.usage.prompt_tokens
            for choice in chunk.choices:
                answer.text += choice.delta.content or ""
                answer.finish_reason = choice.finish_reason or answer.finish_reason
            if nemesis is not None:
                nemesis.see_chunk()
    return answer


async def read_all(server: LiveServer, nemesis: Nemesis | None = None) -> list[Answer]:
    return await asyncio.gather(*(read(server, index, nemesis) for index in range(NUM_STREAMS)))


def wait_ready(server: LiveServer) -> None:
    give_up_s = time.monotonic() + 120
    while server.get("/ready")[0] != 200:
        assert time.monotonic() < give_up_s, server.log


@pytest.mark.parametrize(("how", "times"), [(signal.SIGKILL, 3), (signal.SIGSTOP, 2)])
async def test_answers_are_the_undisturbed_ones(
    own_server: LiveServer, how: signal.Signals, times: int
) -> None:
    before = own_server.metrics()
    undisturbed = await read_all(own_server)
    assert all(answer.completion_tokens == NUM_TOKENS for answer in undisturbed)
    assert len({answer.text for answer in undisturbed}) == NUM_STREAMS
    nemesis = Nemesis(own_server, how, times, every=60)
    assert await read_all(own_server, nemesis) == undisturbed
    assert nemesis.done == times, "the streams ended before the engine was hurt"
    wait_ready(own_server)
    after = own_server.idle_metrics()

    def grown(name: str) -> float:
        return after[f"millrace_engine_{name}_total"] - before[f"millrace_engine_{name}_total"]

    assert grown("restarts") == grown("recoveries") == times
    assert grown("hangs") == (times if how == signal.SIGSTOP else 0)
    assert grown("replayed_requests") > times
    assert grown("given_up_requests") == 0
    assert not after.get("millrace_turns_total{dialect=chat,status=failed}")


async def test_an_idle_engine_that_dies_is_replaced(own_server: LiveServer) -> None:
    wait_ready(own_server)
    restarts = own_server.metrics()["millrace_engine_restarts_total"]
    engine = engine_of(own_server)
    assert engine is not None
    engine.kill()
    engine.wait(30)
    give_up_s = time.monotonic() + 120
    while own_server.metrics()["millrace_engine_recoveries_total"] != restarts + 1:
        assert time.monotonic() < give_up_s, own_server.log
    answer = await read(own_server, 1, None)
    assert answer.completion_tokens == NUM_TOKENS


def test_what_engines_are_forked_from_has_one_thread(own_server: LiveServer) -> None:
    """Of others a fork would leave nothing but the locks that they held."""
    engine = engine_of(own_server)
    assert engine is not None
    zygote = engine.parent()
    assert zygote is not None
    assert zygote.name() == "millrace-zygote"
    assert zygote.num_threads() == 1


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="needs Linux's /proc")
def test_the_engine_is_the_first_to_go_when_memory_runs_out(own_server: LiveServer) -> None:
    engine = engine_of(own_server)
    assert engine is not None
    pids = (own_server.pid, engine.ppid(), engine.pid)
    server, zygote, first = (int(Path(f"/proc/{pid}/oom_score_adj").read_text()) for pid in pids)
    assert server < zygote < first
