"""Limits of keys, counted in the store: several servers count together, whatever ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from server.errors import ApiError
from server.guard.limits import LEASE_S, Limits, Reserved
from server.guard.policy import KeyPolicy
from server.metering.ledger import Ledger, Prices, Used
from server.store import Store
from tests.server.serving import memory_store

NOON_S = 20_000 * 86_400.0 + 43_200


class Clock:
    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


class Cluster:
    """Two servers on one store."""

    def __init__(self, store: Store) -> None:
        self.clock = Clock()
        prices = Prices(prompt=1.0, cached=0.5, completion=4.0)
        self.ledgers = [Ledger(store, prices) for _ in range(2)]
        self.one, self.two = (Limits(store, ledger, self.clock) for ledger in self.ledgers)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    store = await memory_store()
    yield Cluster(store)
    await store.close()


async def refused(limits: Limits, policy: KeyPolicy, tokens: int = 1, turn: str = "x") -> ApiError:
    with pytest.raises(ApiError) as caught:
        await limits.take("me", policy, turn, tokens)
    assert caught.value.status == 429
    assert caught.value.retry_after_s
    return caught.value


async def test_requests_a_minute_are_counted_across_servers(cluster: Cluster) -> None:
    policy = KeyPolicy(requests_per_minute=3)
    cluster.clock.now_s += 20
    for limits in (cluster.one, cluster.two, cluster.one):
        await limits.take("me", policy, "t", 5)
    error = await refused(cluster.two, policy)
    assert (error.code, error.retry_after_s) == ("rate_limit_exceeded", 40)
    assert error.headers["x-ratelimit-limit-requests"] == "3"
    assert error.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.headers["x-ratelimit-reset-requests"] == "40s"
    await cluster.one.take("another", policy, "t", 5)
    cluster.clock.now_s += 40
    await cluster.two.take("me", policy, "t", 5)
    assert cluster.two.headers("me")["x-ratelimit-remaining-requests"] == "2"


async def test_who_is_known_to_be_over_is_refused_without_the_store(cluster: Cluster) -> None:
    policy = KeyPolicy(requests_per_minute=1)
    await cluster.one.take("me", policy, "t", 5)
    cluster.one.check_known("me")
    await refused(cluster.one, policy)
    with pytest.raises(ApiError):
        cluster.one.check_known("me")
    cluster.clock.now_s += 60
    cluster.one.check_known("me")


async def test_refused_requests_count_nothing(cluster: Cluster) -> None:
    policy = KeyPolicy(requests_per_minute=10, tokens_per_minute=100)
    await cluster.one.take("me", policy, "t", 90)
    for _ in range(20):
        error = await refused(cluster.one, policy, 11)
        assert "tokens" in error.message
    await cluster.one.take("me", policy, "t", 10)


async def test_tokens_are_put_right_when_a_turn_has_ended(cluster: Cluster) -> None:
    policy = KeyPolicy(tokens_per_minute=100)
    reserved = await cluster.one.take("me", policy, "t", 100)
    await refused(cluster.two, policy, 1)
    await cluster.one.settle("me", policy, "t", reserved, Used(20, 0, 20))
    await cluster.two.take("me", policy, "t", 60)
    await refused(cluster.one, policy, 1)


async def test_a_turn_may_use_more_than_was_expected(cluster: Cluster) -> None:
    policy = KeyPolicy(tokens_per_minute=100)
    reserved = await cluster.one.take("me", policy, "t", 10)
    await cluster.one.settle("me", policy, "t", reserved, Used(10, 0, 85))
    await refused(cluster.one, policy, 6)


async def test_what_did_not_begin_is_taken_back(cluster: Cluster) -> None:
    policy = KeyPolicy(requests_per_minute=1, tokens_per_minute=10, max_turns=1)
    reserved = await cluster.one.take("me", policy, "t", 10)
    await cluster.one.cancel("me", policy, "t", reserved)
    await cluster.two.take("me", policy, "u", 10)


async def test_one_request_larger_than_a_minute_is_never_possible(cluster: Cluster) -> None:
    with pytest.raises(ApiError) as caught:
        await cluster.one.take("me", KeyPolicy(tokens_per_minute=10), "t", 11)
    assert caught.value.status == 400


async def test_turns_at_once_and_those_of_a_dead_server(cluster: Cluster) -> None:
    policy = KeyPolicy(max_turns=2, requests_per_minute=100)
    reserved = await cluster.one.take("me", policy, "a", 1)
    await cluster.two.take("me", policy, "b", 1)
    assert (await refused(cluster.two, policy, turn="c")).code == "too_many_turns"
    await cluster.one.settle("me", policy, "a", reserved, Used(1, 0, 1))
    await cluster.one.take("me", policy, "c", 1)
    cluster.clock.now_s += LEASE_S - 1
    await cluster.one.renew("me", ["c"])
    cluster.clock.now_s += 2
    await cluster.one.take("me", policy, "d", 1)  # b's server renewed nothing
    await refused(cluster.one, policy, turn="e")


async def test_a_race_lets_in_no_more_than_the_limit(cluster: Cluster) -> None:
    policy = KeyPolicy(max_turns=5, requests_per_minute=100)
    servers = [cluster.one, cluster.two]
    takes = [servers[n % 2].take("me", policy, f"t{n}", 1) for n in range(40)]
    results = await asyncio.gather(*takes, return_exceptions=True)
    assert sum(isinstance(result, Reserved) for result in results) <= 5


async def test_money_of_a_day(cluster: Cluster) -> None:
    policy = KeyPolicy(money_per_day=0.001)
    reserved = await cluster.one.take("me", policy, "t", 1)
    # 100 computed at 1, 100 cached at 0.5, 213 generated at 4 a million: 1002 millionths.
    await cluster.one.settle("me", policy, "t", reserved, Used(200, 100, 213))
    assert await cluster.ledgers[1].spent_micros("me", cluster.clock()) == 1002
    error = await refused(cluster.two, policy)
    assert (error.kind, error.retry_after_s) == ("insufficient_quota", 43_201)
    cluster.clock.now_s += error.retry_after_s or 0
    await cluster.two.take("me", policy, "t", 1)


async def test_everything_counted_has_a_time_to_live(cluster: Cluster) -> None:
    policy = KeyPolicy(requests_per_minute=9, tokens_per_minute=9, max_turns=9, money_per_day=1)
    reserved = await cluster.one.take("me", policy, "t", 3)
    await cluster.one.take("me", policy, "u", 3)
    await cluster.one.settle("me", policy, "t", reserved, Used(1, 0, 1))
    redis = cluster.ledgers[0]._store.redis
    keys = [key async for key in redis.scan_iter("millrace:l*")]
    assert len(keys) == 4
    assert all([await redis.ttl(key) > 0 for key in keys])
