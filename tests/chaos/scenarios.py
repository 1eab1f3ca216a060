"""The scenarios: what is done to whom, and what must come of it.

Each takes a campaign and a count of faults to inject. What a scenario may end with is data
(``goal``); ``now`` loosens it where the server does not do better yet, and is deleted when it does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import psutil

from tests.chaos.aborts import aborts
from tests.chaos.campaign import Campaign
from tests.chaos.chat import ChatClient
from tests.chaos.cluster import StoreType
from tests.chaos.history import History
from tests.chaos.loads import idle_sockets, overload
from tests.chaos.processes import RedisServer
from tests.chaos.proxy import ENDING_KINDS, Plan, Proxy
from tests.chaos.readers import stalled_readers
from tests.chaos.sentinel import SentinelStore
from tests.chaos.tally import Expectation

__all__ = ["SCENARIOS", "Scenario"]

T = TypeVar("T")
Run = Callable[[Campaign, int], Awaitable[None]]

CLIENTS = 4
"""Of one round; few, since one engine of two cores serves them all."""
MEAN_BYTES = 3000
"""Between two faults of a connection: about ten events."""


class Scenario(NamedTuple):
    """One line of the reliability table."""

    name: str
    about: str
    run: Run
    goal: Expectation = Expectation()
    now: Expectation | None = None
    store: StoreType = StoreType.DURABLE

    short: int = 1
    """Faults in the short run of ``make test``; 0: only in the long one."""
    long: int = 20
    """Faults in the long run of ``make chaos``."""
    arguments: tuple[str, ...] = ()
    """More options of the servers."""

    @property
    def expected(self) -> Expectation:
        """What it is held to."""
        return self.now or self.goal


async def cuts(campaign: Campaign, count: int) -> None:
    """Cut connections until ``count`` had to be made anew, on the same or another replica."""

    async def run(urls: list[str]) -> History:
        return await campaign.client(urls).run()

    async def judge(history: History) -> None:
        await campaign.judge(history)
        for note in history.notes:
            if note.what.startswith("lost"):
                campaign.tally.back(history.silence_after_s(note.at_s))

    await _behind_proxies(campaign, count, run, judge)


async def chat_cuts(campaign: Campaign, count: int) -> None:
    """The same for clients of Chat Completions, which go on by the id of their stream."""

    async def run(urls: list[str]) -> ChatClient:
        client = ChatClient(*campaign.draw(), urls, seed=campaign.rng.randrange(2**31))
        await client.run()
        return client

    async def judge(client: ChatClient) -> None:
        campaign.tally.add(client.verdict)

    await _behind_proxies(campaign, count, run, judge)


async def _behind_proxies(
    campaign: Campaign,
    count: int,
    run: Callable[[list[str]], Awaitable[T]],
    judge: Callable[[T], Awaitable[None]],
) -> None:
    """Rounds of clients, each behind its own proxies to all replicas, until ``count`` cuts."""
    cut = 0
    while cut < count:
        async with contextlib.AsyncExitStack() as stack:
            runs = []
            proxies = []
            for _ in range(CLIENTS):
                own = [
                    await stack.enter_async_context(
                        Proxy(
                            "127.0.0.1",
                            replica.port,
                            Plan(campaign.rng.randrange(2**31), mean_bytes=MEAN_BYTES),
                        )
                    )
                    for replica in campaign.cluster.replicas
                ]
                proxies += own
                runs.append(run([proxy.url for proxy in own]))
            for seen in await asyncio.gather(*runs):
                await judge(seen)
            for proxy in proxies:
                campaign.tally.struck.update(
                    {kind.value: number for kind, number in proxy.struck.items()}
                )
        cut = sum(campaign.tally.struck[kind.value] for kind in ENDING_KINDS)


async def engine_kill(campaign: Campaign, count: int) -> None:
    """SIGKILL an engine amid its answers."""

    async def strike() -> str:
        campaign.cluster.replicas[0].engine().kill()
        return "engine killed"

    await _rounds(campaign, count, strike)


async def engine_and_zygote_kill(campaign: Campaign, count: int) -> None:
    """SIGKILL an engine and the process that the next one was to be forked from, at once."""

    async def strike() -> str:
        engine = campaign.cluster.replicas[0].engine()
        zygote = engine.parent()
        assert zygote is not None
        assert zygote.name() == "millrace-zygote"
        engine.kill()
        zygote.kill()
        return "engine and zygote killed"

    await _rounds(campaign, count, strike)


async def engine_stop(campaign: Campaign, count: int) -> None:
    """SIGSTOP an engine and leave it so: a process that lives and does nothing."""

    async def strike() -> str:
        campaign.cluster.replicas[0].engine().suspend()
        return "engine stopped"

    await _rounds(campaign, count, strike)


async def engine_freeze(campaign: Campaign, count: int) -> None:
    """SIGSTOP an engine, and SIGCONT soon after: a machine that was busy for a moment."""

    async def strike() -> str:
        engine = campaign.cluster.replicas[0].engine()
        engine.suspend()
        try:
            await asyncio.sleep(campaign.rng.uniform(0.1, 1.0))
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                engine.resume()
        return "engine frozen"

    await _rounds(campaign, count, strike)


async def server_kill(campaign: Campaign, count: int) -> None:
    """SIGKILL a server amid its answers; clients come back to another, then it is restarted."""

    async def strike() -> str:
        campaign.cluster.replicas[0].kill()
        return "server killed"

    async def heal() -> None:
        await asyncio.to_thread(campaign.cluster.replicas[0].restart)

    await _rounds(campaign, count, strike, heal, addresses=campaign.urls)


async def rolling_restart(campaign: Campaign, count: int) -> None:
    """SIGTERM a server amid its answers and start it again, as an update of all does in turn."""

    async def strike() -> str:
        replica = campaign.rng.choice(campaign.cluster.replicas)
        status = await asyncio.to_thread(replica.terminate)
        assert status == 0, replica.log
        await asyncio.to_thread(replica.restart)
        return "server restarted"

    await _rounds(campaign, count, strike, addresses=campaign.urls)


async def server_freeze(campaign: Campaign, count: int) -> None:
    """SIGSTOP a server for a moment, as a machine that swaps."""

    async def strike() -> str:
        process = psutil.Process(campaign.cluster.replicas[0].live.pid)
        process.suspend()
        try:
            await asyncio.sleep(campaign.rng.uniform(0.1, 1.0))
        finally:
            process.resume()
        return "server frozen"

    await _rounds(campaign, count, strike, addresses=campaign.urls)


async def redis_kill(campaign: Campaign, count: int) -> None:
    """SIGKILL Redis amid the answers, and start it again on what it has kept."""

    async def strike() -> str:
        redis = campaign.cluster.redis
        assert isinstance(redis, RedisServer)
        await asyncio.to_thread(redis.kill)
        await asyncio.sleep(campaign.rng.uniform(0.0, 1.0))
        await asyncio.to_thread(redis.start)
        return "Redis killed"

    await _rounds(campaign, count, strike, addresses=campaign.urls)


async def redis_freeze(campaign: Campaign, count: int) -> None:
    """SIGSTOP Redis for a moment: a store that is slow."""

    async def strike() -> str:
        redis = campaign.cluster.redis
        assert isinstance(redis, RedisServer)
        process = psutil.Process(redis.pid)
        process.suspend()
        try:
            await asyncio.sleep(campaign.rng.uniform(0.1, 1.5))
        finally:
            process.resume()
        return "Redis frozen"

    await _rounds(campaign, count, strike, addresses=campaign.urls)


async def redis_full(campaign: Campaign, count: int) -> None:
    """Leave Redis no memory for a moment: it answers, and refuses to store anything."""

    async def strike() -> str:
        redis = campaign.cluster.redis
        assert isinstance(redis, RedisServer)
        with redis.client() as client:
            client.config_set("maxmemory", "1")
            try:
                await asyncio.sleep(campaign.rng.uniform(0.1, 1.5))
            finally:
                client.config_set("maxmemory", "0")
        return "Redis full"

    await _rounds(campaign, count, strike, addresses=campaign.urls)


async def fail_over(campaign: Campaign, count: int) -> None:
    """Kill the Redis master amid the answers; the Sentinels make the replica master."""

    async def strike() -> str:
        store = campaign.cluster.redis
        assert isinstance(store, SentinelStore)
        await asyncio.to_thread(store.fail_over)
        return "failed over"

    await _rounds(campaign, count, strike, addresses=campaign.urls)


async def server_pause(campaign: Campaign, count: int) -> None:
    """SIGSTOP a server until others take it for dead, then SIGCONT: it must not go on as before."""

    async def strike() -> str:
        process = psutil.Process(campaign.cluster.replicas[0].live.pid)
        process.suspend()
        try:
            await asyncio.sleep(campaign.rng.uniform(2.5, 6.0))
        finally:
            process.resume()
        return "server paused"

    await _rounds(campaign, count, strike, addresses=campaign.urls)


async def clock_jump(campaign: Campaign, count: int) -> None:
    """Set the servers' wall clock forward and back amid their answers, by up to a month."""

    async def strike() -> str:
        rng = campaign.rng
        campaign.cluster.move_clock(rng.choice((-1, 1)) * rng.choice((5, 3600, 30 * 86400)))
        return "clock set"

    async def heal() -> None:
        campaign.cluster.move_clock(0.0)

    await _rounds(campaign, count, strike, heal, addresses=campaign.urls)


async def _rounds(
    campaign: Campaign,
    count: int,
    strike: Callable[[], Awaitable[str]],
    heal: Callable[[], Awaitable[None]] | None = None,
    *,
    addresses: list[str] | None = None,
) -> None:
    cluster = campaign.cluster
    while campaign.tally.num_struck < count:
        await campaign.strike_amid(
            CLIENTS, strike, addresses=addresses or [cluster.replicas[0].url]
        )
        if heal is not None:
            await heal()
        await asyncio.to_thread(cluster.until_ready)
        if campaign.tally.num_histories > 50 * CLIENTS * count:
            return


SCENARIOS = {
    one.name: one
    for one in (
        Scenario(
            "cuts",
            "connections cut, reset, half-closed, stalled, throttled, split",
            cuts,
            short=8,
            long=10_000,
        ),
        Scenario(
            "chat-cuts", "the same, of Chat Completions streams", chat_cuts, short=4, long=1000
        ),
        Scenario("engine-kill", "SIGKILL of the engine", engine_kill, long=200),
        Scenario(
            "engine-and-zygote-kill",
            "SIGKILL of the engine and of what engines are forked from, at once",
            engine_and_zygote_kill,
            long=50,
        ),
        Scenario("engine-stop", "SIGSTOP of the engine, for good", engine_stop, short=0, long=100),
        Scenario("engine-freeze", "SIGSTOP of the engine for up to 1 s", engine_freeze),
        Scenario("server-kill", "SIGKILL of a server", server_kill, long=200),
        Scenario("rolling-restart", "SIGTERM of a server, and its new start", rolling_restart),
        Scenario("server-freeze", "SIGSTOP of a server for up to 1 s", server_freeze, short=0),
        Scenario("redis-kill", "SIGKILL of Redis, its log on disk", redis_kill, long=100),
        Scenario(
            "redis-loss",
            "SIGKILL of Redis that keeps nothing",
            redis_kill,
            Expectation(
                endings=("whole", "failed history_lost", "refused 404 response_not_found"),
                least_whole=0.5,
                gaps=True,
                within_s=10.0,
                hung_s=10.0,
            ),
            store=StoreType.FORGETFUL,
            short=0,
        ),
        Scenario("server-pause", "SIGSTOP of a server for 2.5 to 6 s", server_pause, short=0),
        Scenario("clock-jump", "the wall clock set forward and back", clock_jump),
        Scenario(
            "failover",
            "Sentinel makes the replica master",
            fail_over,
            # What the new master lacks is in the memory of the servers, which write it again.
            Expectation(within_s=10.0, hung_s=10.0),
            store=StoreType.SENTINEL,
            short=0,
            long=30,
        ),
        Scenario("redis-full", "Redis without memory for up to 1.5 s", redis_full),
        Scenario("redis-freeze", "SIGSTOP of Redis for up to 1.5 s", redis_freeze, short=0),
        Scenario(
            "aborts",
            "aborts at random moments: queued, between chunks, mid-step, preempted",
            aborts,
            Expectation(endings=("whole", "cancelled"), least_whole=0.0),
            short=24,
            long=10_000,
        ),
        Scenario(
            "stalled-readers",
            "readers that stop reading, and the others",
            stalled_readers,
            # Their long answers and the others' share one small engine: some wait for their place.
            Expectation(within_s=30.0, hung_s=30.0),
            short=6,
            long=200,
        ),
        Scenario(
            "overload",
            "twice the requests that can be answered",
            overload,
            Expectation(endings=("whole", "refused 429"), least_whole=0.0, hung_s=30.0),
            short=0,
            long=200,
            arguments=("--max-queue-wait", "2"),
        ),
        Scenario(
            "idle-sockets",
            "WebSockets that say nothing",
            idle_sockets,
            Expectation(),
            short=0,
            long=5000,
        ),
    )
}
