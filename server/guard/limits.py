"""Limits of API keys, counted in the store, so that all servers of a cluster count together.

Requests and tokens are counted in minutes of the clock (a counter a minute, which the store drops),
turns at once as leases in a sorted set (those of a server that died run out), money in the ledger.
What a request will cost is counted when it is let in and put right when it has ended.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

from server.errors import ApiError
from server.guard.policy import KeyPolicy
from server.metering.ledger import Ledger, Used
from server.store import Store, reaching

__all__ = ["LEASE_S", "Limits", "Reserved", "minute_of"]

LEASE_S = 60.0
"""How long a turn counts if nobody renews it."""
_MINUTE_S = 60
_KEEP_S = 3 * _MINUTE_S


def minute_of(now_s: float) -> int:
    """Return which minute of the clock a time (Unix seconds) is in."""
    return int(now_s // _MINUTE_S)


class Reserved(NamedTuple):
    """What was counted for a turn that was let in."""

    minute: int
    tokens: int


class _Counted(NamedTuple):
    """One limit of a minute, with the request counted."""

    name: str
    limit: int
    total: int
    cost: int


class Limits:
    """Counts and refuses. Every method may raise StoreError; ``clock`` gives Unix seconds."""

    def __init__(
        self, store: Store, ledger: Ledger, clock: Callable[[], float] = time.time
    ) -> None:
        self._store = store
        self._ledger = ledger
        self._clock = clock
        self._headers: dict[str, dict[str, str]] = {}
        self._blocked: dict[str, tuple[float, str]] = {}

    def headers(self, owner: str) -> dict[str, str]:
        """Return OpenAI's ``x-ratelimit-*`` headers as of the owner's latest request."""
        return self._headers.get(owner, {})

    def check_known(self, owner: str) -> None:
        """Refuse without asking the store who is known to have used up this minute."""
        until_s, name = self._blocked.get(owner, (0.0, ""))
        now_s = self._clock()
        if now_s < until_s:
            raise self._refused(owner, name, until_s - now_s)
        self._blocked.pop(owner, None)

    async def take(self, owner: str, policy: KeyPolicy, turn_id: str, num_tokens: int) -> Reserved:
        """Count a request of ``num_tokens`` expected tokens.

        Raises ApiError 429, with nothing counted, when it exceeds a limit; 400 when it is larger
        than a whole minute's tokens.
        """
        now_s = self._clock()
        minute = minute_of(now_s)
        limit = policy.tokens_per_minute
        if limit is not None and num_tokens > limit:
            raise ApiError(
                400,
                f"The request may use {num_tokens} tokens, but this key has {limit} a minute.",
                code="tokens_limit_exceeded",
            )
        if policy.money_per_day is not None:
            await self._check_money(owner, policy.money_per_day, now_s)
        await self._take_minute(owner, policy, minute, num_tokens, now_s)
        if policy.max_turns is not None:
            try:
                await self._take_turn(owner, policy.max_turns, turn_id, now_s)
            except BaseException:
                await self._give_back(owner, policy, Reserved(minute, num_tokens), 1)
                raise
        return Reserved(minute, num_tokens)

    async def renew(self, owner: str, turn_ids: list[str]) -> None:
        """Keep the leases of turns that still run."""
        lease = dict.fromkeys(turn_ids, self._clock() + LEASE_S)
        with reaching():
            await self._store.redis.zadd(self._key(owner, "turns"), lease, xx=True)

    async def settle(
        self, owner: str, policy: KeyPolicy, turn_id: str, reserved: Reserved, used: Used
    ) -> None:
        """Enter what a turn really used, and that it has ended."""
        if policy.max_turns is not None:
            with reaching():
                await self._store.redis.zrem(self._key(owner, "turns"), turn_id)
        tokens = used.prompt_tokens + used.completion_tokens
        unused = Reserved(reserved.minute, reserved.tokens - tokens)
        await self._give_back(owner, policy, unused, 0)
        await self._ledger.add(owner, used, self._clock())

    async def cancel(self, owner: str, policy: KeyPolicy, turn_id: str, reserved: Reserved) -> None:
        """Take back what was counted for a turn that did not begin."""
        if policy.max_turns is not None:
            with reaching():
                await self._store.redis.zrem(self._key(owner, "turns"), turn_id)
        await self._give_back(owner, policy, reserved, 1)

    def _key(self, owner: str, *parts: str) -> str:
        return self._store.key("limit", owner, *parts)

    async def _check_money(self, owner: str, limit: float, now_s: float) -> None:
        if await self._ledger.spent_micros(owner, now_s) < limit * 1e6:
            return
        raise ApiError(
            429,
            f"This key has spent its {limit:g} for today; the day ends at midnight UTC.",
            kind="insufficient_quota",
            code="insufficient_quota",
            retry_after_s=self._ledger.day_ends_in_s(now_s),
        )

    async def _take_minute(
        self, owner: str, policy: KeyPolicy, minute: int, num_tokens: int, now_s: float
    ) -> None:
        wanted = [
            ("requests", policy.requests_per_minute, 1),
            ("tokens", policy.tokens_per_minute, num_tokens),
        ]
        limited = [(name, limit, cost) for name, limit, cost in wanted if limit is not None]
        if not limited:
            return
        with reaching():
            async with self._store.redis.pipeline(transaction=True) as pipe:
                for name, _, cost in limited:
                    pipe.incrby(self._key(owner, name, str(minute)), cost)
                    pipe.expire(self._key(owner, name, str(minute)), _KEEP_S)
                counts = (await pipe.execute())[::2]
        counted = [
            _Counted(name, limit, int(count), cost)
            for (name, limit, cost), count in zip(limited, counts, strict=True)
        ]
        left_s = (minute + 1) * _MINUTE_S - now_s
        over = [one for one in counted if one.total > one.limit]
        if over:
            await self._give_back(owner, policy, Reserved(minute, num_tokens), 1)
            counted = [one._replace(total=one.total - one.cost) for one in counted]
        self._headers[owner] = _headers(counted, left_s)
        if over:
            if any(one.name == "requests" for one in over):
                self._blocked[owner] = (now_s + left_s, "requests")
            raise self._refused(owner, over[0].name, left_s)

    def _refused(self, owner: str, name: str, left_s: float) -> ApiError:
        wait_s = max(1, math.ceil(left_s))
        error = ApiError(
            429,
            f"This key has used up its {name} of this minute; try again in {wait_s} s.",
            kind="rate_limit_error",
            code="rate_limit_exceeded",
            retry_after_s=wait_s,
        )
        error.headers.update(self.headers(owner))
        return error

    async def _take_turn(self, owner: str, limit: int, turn_id: str, now_s: float) -> None:
        key = self._key(owner, "turns")
        with reaching():
            async with self._store.redis.pipeline(transaction=True) as pipe:
                pipe.zremrangebyscore(key, 0, now_s)
                pipe.zadd(key, {turn_id: now_s + LEASE_S})
                pipe.zcard(key)
                pipe.expire(key, int(10 * LEASE_S))
                count = int((await pipe.execute())[2])
            if count > limit:
                await self._store.redis.zrem(key, turn_id)
        if count > limit:
            raise ApiError(
                429,
                f"This key has {limit} turns running; wait for one to end.",
                kind="rate_limit_error",
                code="too_many_turns",
                retry_after_s=2,
            )

    async def _give_back(
        self, owner: str, policy: KeyPolicy, unused: Reserved, requests: int
    ) -> None:
        amounts = []
        if policy.requests_per_minute is not None and requests:
            amounts.append(("requests", requests))
        if policy.tokens_per_minute is not None and unused.tokens:
            amounts.append(("tokens", unused.tokens))
        if not amounts:
            return
        with reaching():
            async with self._store.redis.pipeline(transaction=True) as pipe:
                for name, amount in amounts:
                    key = self._key(owner, name, str(unused.minute))
                    pipe.decrby(key, amount)
                    # A turn may end minutes later: its counter is gone, and comes and goes again.
                    pipe.expire(key, _KEEP_S)
                await pipe.execute()


def _headers(counted: list[_Counted], left_s: float) -> dict[str, str]:
    headers = {}
    for name, limit, count, _ in counted:
        headers[f"x-ratelimit-limit-{name}"] = str(limit)
        headers[f"x-ratelimit-remaining-{name}"] = str(max(0, limit - count))
        headers[f"x-ratelimit-reset-{name}"] = f"{max(1, math.ceil(left_s))}s"
    return headers
