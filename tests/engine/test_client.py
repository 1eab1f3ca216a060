"""EngineClient against real processes that speak the real link (tests/engine/fake_engine.py)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator

import psutil
import pytest

from engine.client import EngineClient, EngineState
from engine.config import EngineConfig
from engine.errors import CheckpointError, EngineClosed, EngineDied, RequestError
from engine.streams import RequestStream
from engine.types import FinishReason, Request, SamplingParams
from tests.engine.fake_engine import HANG, INFO

COMMAND = (sys.executable, "-m", "tests.engine.fake_engine")


def request(name: str, prompt: list[int], max_tokens: int = 5) -> Request:
    return Request(
        request_id=name, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens)
    )


async def tokens(stream: RequestStream) -> list[int]:
    return [token async for delta in stream for token in delta.token_ids]


@pytest.fixture
async def client() -> AsyncIterator[EngineClient]:
    client = await EngineClient.start(EngineConfig(), command=COMMAND)
    yield client
    await client.close()


async def test_start_reports_progress_and_the_model() -> None:
    seen: list[tuple[str, float]] = []
    client = await EngineClient.start(
        EngineConfig(), on_progress=lambda *step: seen.append(step), command=COMMAND
    )
    assert client.info == INFO
    assert seen == [("counting", 0.5)]
    assert client.state is EngineState.READY
    pid = client.pid
    assert pid is not None
    await client.close()
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineClosed, match="closed"):
        client.generate(request("late", [0]))


async def test_requests_get_their_own_tokens_in_order(client: EngineClient) -> None:
    streams = [client.generate(request(f"r{i}", [100 * i], 40)) for i in range(20)]
    answers = await asyncio.gather(*(tokens(stream) for stream in streams))
    assert answers == [[100 * i + j for j in range(1, 41)] for i in range(20)]


async def test_a_late_reader_gets_everything_merged(client: EngineClient) -> None:
    late = client.generate(request("late", [0], 50))
    assert await tokens(client.generate(request("other", [0], 80))) == list(range(1, 81))
    deltas = [delta async for delta in late]
    assert len(deltas) == 1
    assert deltas[0].token_ids == list(range(1, 51))
    assert deltas[0].finish_reason is FinishReason.LENGTH


async def test_leaving_early_aborts(client: EngineClient) -> None:
    stream = client.generate(request("left", [0], 10**9))
    assert (await anext(stream)).token_ids[0] == 1
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    # The next answer comes only after the engine has read the abort before it.
    await tokens(client.generate(request("next", [0], 3)))
    assert client.stats.running == 0


async def test_abort_ends_the_stream_with_its_reason(client: EngineClient) -> None:
    stream = client.generate(request("a", [0], 10**9))
    client.abort("a")
    client.abort("never seen")
    deltas = [delta async for delta in stream]
    assert deltas[-1].finish_reason is FinishReason.ABORT


async def test_a_request_id_in_use_is_refused(client: EngineClient) -> None:
    stream = client.generate(request("twice", [0], 10**9))
    with pytest.raises(RequestError, match="'twice' is in use"):
        client.generate(request("twice", [0]))
    await stream.aclose()


async def test_close_ends_a_hung_engine_and_its_requests(client: EngineClient) -> None:
    stream = client.generate(request("hung", [HANG]))
    pid = client.pid
    assert pid is not None
    closing = asyncio.create_task(client.close())
    with pytest.raises(EngineClosed):
        await tokens(stream)
    await closing
    assert not psutil.pid_exists(pid)
    with pytest.raises(EngineClosed):
        client.generate(request("late", [0]))
    await client.close()


async def test_a_refused_checkpoint_is_a_typed_error() -> None:
    with pytest.raises(CheckpointError, match="hidden_size is 0"):
        await EngineClient.start(EngineConfig(model="refuse"), command=COMMAND)


async def test_death_at_the_start_is_a_typed_error() -> None:
    with pytest.raises(EngineDied, match="signal 9"):
        await EngineClient.start(EngineConfig(model="die-at-start"), command=COMMAND)


async def test_no_process_outlives_a_cancelled_start() -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    task = asyncio.create_task(EngineClient.start(EngineConfig(), command=COMMAND))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


@pytest.mark.parametrize("engine_state", ["idle", "stopped"])
async def test_no_process_outlives_a_killed_server(engine_state: str) -> None:
    script = (
        "import asyncio, sys\n"
        "from engine.client import EngineClient\n"
        "from engine.config import EngineConfig\n"
        "async def main():\n"
        f"    client = await EngineClient.start(EngineConfig(), command={COMMAND!r})\n"
        "    print(client.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE
    )
    assert server.stdout is not None
    engine = psutil.Process(int(await server.stdout.readline()))
    family = psutil.Process(server.pid).children(recursive=True)
    assert engine in family
    assert len(family) == 3
    if engine_state == "stopped":
        engine.suspend()
    os.kill(server.pid, signal.SIGKILL)
    await server.wait()
    _, alive = await asyncio.to_thread(psutil.wait_procs, family, 15)
    assert not alive
