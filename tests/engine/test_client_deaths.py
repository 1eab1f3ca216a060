"""Engines die in every way while EngineClient has requests in flight; its readers see no trace.

The processes are real and speak the real link (tests/engine/fake_engine.py); the watchdog's limits
are set so that a busy machine is not taken for a hang.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from engine import client as client_module
from engine import recovery, watchdog
from engine.client import EngineClient, EngineState
from engine.config import EngineConfig
from engine.errors import EngineClosed, EngineDied
from engine.inflight import MAX_STRIKES
from engine.streams import RequestStream
from engine.types import Delta, FinishReason, Request, SamplingParams
from tests.engine.fake_engine import DIE, HANG, LOSE, POISON

COMMAND = (sys.executable, "-m", "tests.engine.fake_engine")
WAYS = ("kill", "lose", "half", "stop", "spin", "sleep", "garble")


@pytest.fixture(autouse=True, scope="module")
def impatience() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "HANG_S", 2.5)
        patch.setattr(recovery, "RESTART_DELAY_S", 0.01)
        yield


def request(name: str, prompt: list[int], max_tokens: int = 5) -> Request:
    return Request(
        request_id=name, prompt_ids=prompt, sampling=SamplingParams(max_tokens=max_tokens)
    )


async def start(path: Path, *script: str) -> EngineClient:
    """A client of fake engines that each follow one line of the script."""
    file = path / "script"
    file.write_text("\n".join(script))
    return await EngineClient.start(EngineConfig(model=f"script:{file}"), command=COMMAND)


async def deltas(stream: RequestStream) -> list[Delta]:
    return [delta async for delta in stream]


async def tokens(stream: RequestStream) -> list[int]:
    return [token for delta in await deltas(stream) for token in delta.token_ids]


async def until(client: EngineClient, state: EngineState) -> None:
    while client.state is not state:
        await asyncio.sleep(0.005)


def hurt(client: EngineClient, how: signal.Signals) -> int:
    pid = client.pid
    assert pid is not None
    os.kill(pid, how)
    return pid


async def zygote_of(client: EngineClient) -> psutil.Process:
    """The process that engines are forked from, once it is ready to."""
    while (zygote := client._nursery.zygote) is None or not zygote.prepared:
        await asyncio.sleep(0.005)
    return psutil.Process(zygote.pid)


async def spare_of(client: EngineClient) -> psutil.Process:
    """The process that takes the place of that one."""
    while (spare := client._nursery._spare) is None or spare.lost.is_set():
        await asyncio.sleep(0.005)
    return psutil.Process(spare.pid)


async def take_engine(client: EngineClient) -> None:
    """Kill the engine, and have the next one take its time."""
    (await zygote_of(client)).suspend()
    hurt(client, signal.SIGKILL)
    await until(client, EngineState.RESTARTING)


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[EngineClient]:
    client = await start(tmp_path)
    yield client
    await client.close()


@pytest.mark.parametrize("way", WAYS)
async def test_no_way_to_die_is_seen_by_a_reader(tmp_path: Path, way: str) -> None:
    client = await start(tmp_path, f"{way} 22", f"{way} 27")
    streams = [client.generate(request(f"r{i}", [100 * i + 1], 40)) for i in range(5)]
    answers = await asyncio.gather(*map(deltas, streams))
    for index, answer in enumerate(answers):
        ids = [token for delta in answer for token in delta.token_ids]
        assert ids == [100 * index + 1 + n for n in range(1, 41)]
        assert answer[-1].finish_reason is FinishReason.LENGTH
        assert answer[-1].usage is not None
        assert answer[-1].usage.completion_tokens == 40
    recoveries = client.recoveries
    assert (recoveries.restarts, recoveries.recovered, recoveries.replayed) == (2, 2, 10)
    assert recoveries.hangs == (2 if way in ("stop", "spin", "sleep") else 0)
    assert recoveries.given_up == 0
    assert recoveries.recovery_s > 0
    if way in ("kill", "stop"):  # whose last figures arrive
        assert client.stats.generation_tokens == 200
    await client.close()


@pytest.mark.parametrize("seed", range(4))
async def test_random_deaths_leave_every_answer_as_it_is(tmp_path: Path, seed: int) -> None:
    """But for requests that are given up because engine after engine died under them."""
    rng = random.Random(seed)
    ways = rng.choices(("kill", "lose", "half", "garble"), k=rng.randint(1, 5))
    client = await start(tmp_path, *(f"{way} {rng.randint(1, 40)}" for way in ways))
    lengths = [rng.randint(1, 30) for _ in range(rng.randint(1, 8))]
    streams = [
        client.generate(request(f"r{i}", [1000 * i + 1], length))
        for i, length in enumerate(lengths)
    ]
    answers = await asyncio.gather(*map(tokens, streams), return_exceptions=True)
    for index, (answer, length) in enumerate(zip(answers, lengths, strict=True)):
        if isinstance(answer, BaseException):
            assert isinstance(answer, EngineDied)
        else:
            assert answer == [1000 * index + 1 + n for n in range(1, length + 1)]
    given_up = sum(isinstance(answer, BaseException) for answer in answers)
    assert given_up == client.recoveries.given_up
    # From the third death on, each may take the one request that was tried alone.
    assert given_up <= max(0, len(ways) - MAX_STRIKES + 1)
    await client.close()


async def test_many_kills_are_no_reason_to_give_up(client: EngineClient) -> None:
    stream = client.generate(request("long", [0], 10**9))
    seen = 0
    for _ in range(5):
        killed = hurt(client, signal.SIGKILL)
        brought = 0
        while brought < 8:  # an engine that brings less may be said to die of the request
            delta = await anext(stream)
            assert delta.token_ids == list(range(seen + 1, seen + 1 + len(delta.token_ids)))
            seen += len(delta.token_ids)
            if client.pid not in (killed, None) and client.state is EngineState.READY:
                brought += len(delta.token_ids)
    assert client.recoveries.restarts >= 5
    await stream.aclose()


async def test_a_stopped_idle_engine_is_replaced(client: EngineClient) -> None:
    pid = hurt(client, signal.SIGSTOP)
    while not client.recoveries.recovered:
        await asyncio.sleep(0.005)
    assert not psutil.pid_exists(pid)
    assert await tokens(client.generate(request("again", [7], 3))) == [8, 9, 10]
    assert (client.recoveries.hangs, client.recoveries.recovered) == (1, 1)


async def test_a_request_that_the_engine_lost_is_asked_again(client: EngineClient) -> None:
    """The engine idles and sends its heartbeats, but somebody waits: that is a hang, too."""
    lost = client.generate(request("lost", [LOSE, 0], 3))
    with pytest.raises(EngineDied):  # this engine loses it again and again
        await tokens(lost)
    assert client.recoveries.hangs == 3


@pytest.mark.parametrize("poison", [DIE, POISON, HANG])
async def test_a_request_that_kills_engines_goes_alone(client: EngineClient, poison: int) -> None:
    others = [client.generate(request(f"r{i}", [100 * i], 60)) for i in range(4)]
    bad = client.generate(request("bad", [poison, 0], 10))
    others += [client.generate(request(f"r{i}", [100 * i], 60)) for i in range(4, 8)]
    got: list[int] = []
    with pytest.raises(EngineDied, match="3 engine processes died"):
        async for delta in bad:
            got += delta.token_ids
    assert got == list(range(1, len(got) + 1))
    answers = await asyncio.gather(*map(tokens, others))
    assert answers == [[100 * i + j for j in range(1, 61)] for i in range(8)]
    assert client.recoveries.given_up == 1
    await until(client, EngineState.READY)
    assert await tokens(client.generate(request("again", [7], 3))) == [8, 9, 10]


async def test_abort_and_leave_work_without_an_engine(client: EngineClient) -> None:
    aborted = client.generate(request("aborted", [0], 10**9))
    left = client.generate(request("left", [0], 10**9))
    stays = client.generate(request("stays", [0], 200))
    await anext(aborted)
    await take_engine(client)
    client.abort("aborted")
    await left.aclose()
    rest = await deltas(aborted)  # now, not when an engine is back
    assert client.state is EngineState.RESTARTING
    assert rest[-1].finish_reason is FinishReason.ABORT
    assert rest[-1].usage is not None
    assert rest[-1].usage.completion_tokens > 0
    assert len(await tokens(stays)) == 200
    assert client.stats.running == 0


async def test_an_abort_that_the_dead_engine_did_not_answer_is_kept(client: EngineClient) -> None:
    hurt(client, signal.SIGSTOP)
    stream = client.generate(request("a", [0], 10**9))
    client.abort("a")
    last = (await deltas(stream))[-1]
    assert last.finish_reason is FinishReason.ABORT
    assert client.recoveries.hangs == 1


async def test_requests_wait_for_the_next_engine_up_to_a_bound(
    client: EngineClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_WAITING", 3)
    running = client.generate(request("running", [0], 1000))
    await take_engine(client)
    early = [client.generate(request(f"early{i}", [10 * i], 3)) for i in range(3)]
    with pytest.raises(EngineClosed, match="4 requests wait"):
        client.generate(request("too many", [0]))
    answers = await asyncio.gather(*map(tokens, early))
    assert answers == [[10 * i + 1, 10 * i + 2, 10 * i + 3] for i in range(3)]
    assert len(await tokens(running)) == 1000


async def test_no_engine_can_be_started_again(tmp_path: Path) -> None:
    client = await start(tmp_path, "kill 3", *["refuse 0", "die 0"] * 3)
    stream = client.generate(request("a", [0], 10))
    got = []
    with pytest.raises(EngineDied, match="cannot be started again"):
        async for delta in stream:
            got += delta.token_ids
    assert got == [1, 2, 3]
    assert client.state is EngineState.CLOSED
    with pytest.raises(EngineClosed):
        client.generate(request("late", [0]))
    await client.close()


async def test_nobody_waits_for_ever(tmp_path: Path) -> None:
    client = await start(tmp_path, "kill 3", *["die 0"] * 5)
    client._patience_s = 0.05
    with pytest.raises(EngineDied, match="no engine came up"):
        await tokens(client.generate(request("a", [0], 10)))
    await client.close()


async def test_a_failed_restart_is_followed_by_another(tmp_path: Path) -> None:
    client = await start(tmp_path, "kill 3", "refuse 0", "die 0")
    assert await tokens(client.generate(request("a", [0], 10))) == list(range(1, 11))
    assert client.recoveries.restarts == 3
    await client.close()


async def test_engines_are_forked_from_one_process(tmp_path: Path) -> None:
    client = await start(tmp_path, "kill 5", "stop 9", "kill 3")
    zygote = await zygote_of(client)
    assert await tokens(client.generate(request("a", [0], 20))) == list(range(1, 21))
    assert await zygote_of(client) == zygote
    spare = await spare_of(client)
    assert {child.pid for child in zygote.children()} == {client.pid, spare.pid}
    assert client.recoveries.recovered == 3
    await client.close()
    assert not zygote.is_running()
    assert not spare.is_running()


async def test_three_kills_in_quick_succession(client: EngineClient) -> None:
    """Each as soon as the next engine is there: the answer goes on after the last of them."""
    stream = client.generate(request("a", [0], 3000))
    await anext(stream)
    killed: set[int] = set()
    while len(killed) < 2:
        if client.pid not in (None, *killed):
            killed.add(hurt(client, signal.SIGKILL))
        await asyncio.sleep(0)
    # A third one that brought nothing would be said to have died of the request.
    seen = (await anext(stream)).token_ids
    while client.pid in (None, *killed):
        seen += (await anext(stream)).token_ids
    for _ in range(8):
        seen += (await anext(stream)).token_ids
    hurt(client, signal.SIGKILL)
    seen += await tokens(stream)
    assert seen == list(range(seen[0], 3001))
    assert client.recoveries.restarts == 3


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_zygote_that_is_not_fit_is_replaced(tmp_path: Path, how: signal.Signals) -> None:
    client = await start(tmp_path, "kill 5")
    zygote = await zygote_of(client)
    os.kill(zygote.pid, how)
    assert await tokens(client.generate(request("a", [0], 20))) == list(range(1, 21))
    assert client.recoveries.recovered == 1
    assert await zygote_of(client) != zygote
    await client.close()
    assert not zygote.is_running()


async def test_a_zygote_that_is_killed_alone_is_replaced(client: EngineClient) -> None:
    zygote, engine = await zygote_of(client), client.pid
    zygote.kill()
    while (present := client._nursery.zygote) is not None and present.pid == zygote.pid:
        await asyncio.sleep(0.005)
    zygote_next = await zygote_of(client)
    assert client.pid == engine
    hurt(client, signal.SIGKILL)
    assert await tokens(client.generate(request("a", [0], 20))) == list(range(1, 21))
    spare = await spare_of(client)
    assert {child.pid for child in zygote_next.children()} == {client.pid, spare.pid}


async def test_a_spare_takes_the_place_of_a_zygote_killed_with_its_engine(tmp_path: Path) -> None:
    client = await start(tmp_path)
    stream = client.generate(request("a", [0], 3000))
    seen = (await anext(stream)).token_ids
    killed: list[psutil.Process] = []
    for _ in range(3):
        zygote, spare = await zygote_of(client), await spare_of(client)
        hurt(client, signal.SIGKILL)
        zygote.kill()
        killed.append(zygote)
        for _ in range(8):  # one that brought nothing would be said to have died of the request
            seen += (await anext(stream)).token_ids
        assert await zygote_of(client) == spare
        assert (await spare_of(client)) not in (zygote, spare)
        # Orphans are not left to init.
        assert spare.ppid() == os.getpid()
    seen += await tokens(stream)
    assert seen == list(range(1, 3001))
    last = [await zygote_of(client), await spare_of(client)]
    await client.close()
    assert not any(process.is_running() for process in [*killed, *last])


async def test_a_spare_that_dies_alone_is_replaced(client: EngineClient) -> None:
    zygote, spare = await zygote_of(client), await spare_of(client)
    assert spare.name() == "millrace-spare"
    spare.kill()
    while (present := await spare_of(client)) == spare:
        await asyncio.sleep(0.005)
    assert await zygote_of(client) == zygote
    assert present.ppid() == zygote.pid


async def test_without_a_spare_another_zygote_is_started(client: EngineClient) -> None:
    zygote, spare = await zygote_of(client), await spare_of(client)
    hurt(client, signal.SIGKILL)
    for process in (spare, zygote):
        process.kill()
    assert await tokens(client.generate(request("a", [0], 20))) == list(range(1, 21))
    assert await zygote_of(client) not in (zygote, spare)
