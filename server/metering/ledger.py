"""What each key used and owes, a day at a time, in the store."""

from __future__ import annotations

import time
from typing import NamedTuple

import msgspec

from server.store import Store, reaching

__all__ = ["Ledger", "Prices", "Used"]

KEEP_S = 100 * 24 * 3600
"""How long a day's sums are kept."""
_DAY_S = 24 * 3600


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """Per million tokens, in whatever unit the operator thinks in."""

    prompt: float = 0.0
    """Prompt tokens that were computed."""
    cached: float = 0.0
    """Prompt tokens from the prefix cache."""
    completion: float = 0.0

    def micros(self, used: Used) -> int:
        """Return the cost in millionths of the unit, rounded up."""
        computed = used.prompt_tokens - used.cached_tokens
        cost = (
            computed * self.prompt
            + used.cached_tokens * self.cached
            + used.completion_tokens * self.completion
        )
        return -int(-cost // 1)


class Used(NamedTuple):
    """Tokens of a turn; the prompt's include those from the cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class Ledger:
    """Sums per owner and day (UTC). Every method may raise StoreError."""

    def __init__(self, store: Store, prices: Prices) -> None:
        self._store = store
        self.prices = prices

    def _key(self, owner: str, now_s: float) -> str:
        return self._store.key("ledger", owner, time.strftime("%Y-%m-%d", time.gmtime(now_s)))

    async def add(self, owner: str, used: Used, now_s: float) -> None:
        """Enter a turn that ended."""
        key = self._key(owner, now_s)
        with reaching():
            async with self._store.redis.pipeline(transaction=True) as pipe:
                for field, count in zip(Used._fields, used, strict=True):
                    pipe.hincrby(key, field, count)
                pipe.hincrby(key, "turns", 1)
                pipe.hincrby(key, "micros", self.prices.micros(used))
                pipe.expire(key, KEEP_S)
                await pipe.execute()

    async def spent_micros(self, owner: str, now_s: float) -> int:
        """Return what an owner spent today, millionths of the unit."""
        with reaching():
            return int(await self._store.redis.hget(self._key(owner, now_s), "micros") or 0)

    @staticmethod
    def day_ends_in_s(now_s: float) -> int:
        """Return the seconds to midnight UTC, rounded up."""
        return int(_DAY_S - now_s % _DAY_S) + 1
