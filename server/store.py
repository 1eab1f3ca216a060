"""Where state lives: one code path over redis-py, whatever is behind it.

Everything stored lies under ``millrace:`` and has a time to live. The one key without is
``millrace:epoch``, a random word that is written when it is missing: as long as it is the same, the
store has not lost its history.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import shutil
from collections.abc import Iterator
from enum import Enum

from redis.asyncio import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from server.redis_child import RedisChild, RedisChildError
from server.sentinel import SentinelAddress, SentinelError, SentinelGroup, is_sentinel_url

__all__ = ["Store", "StoreError", "StoreKind", "StoreUnavailable", "reaching"]

log = logging.getLogger("millrace.store")

PREFIX = "millrace"
CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 10.0
"""Longer than any command blocks."""
MAX_CONNECTIONS = 256
FORM = "redis://[user:password@]host[:port][/DB], rediss://... or unix:///path"
ELECTION_S = 10.0
"""How long a server that starts amid a failover waits for the new master."""
ELECTION_RETRY_S = 0.1


class StoreKind(Enum):
    """What is behind a store."""

    REDIS = "redis"
    """A Redis the operator named: shared, and it outlives this process."""
    CHILD = "child"
    """A private ``redis-server`` that ends with this process."""
    MEMORY = "memory"
    """In this process: for trying things out."""


class StoreError(Exception):
    """The store cannot be reached, or refuses to serve."""


class StoreUnavailable(StoreError):
    """The store does not answer now; it may later."""


class Store:
    """An open store. ``redis`` is the client: bytes in, bytes out."""

    def __init__(
        self,
        kind: StoreKind,
        redis: Redis,
        where: str,
        child: RedisChild | None = None,
        sentinels: SentinelGroup | None = None,
    ) -> None:
        self.kind = kind
        self.redis = redis
        self.where = where
        """For people: what the store is; without passwords."""
        self._child = child
        self._sentinels = sentinels
        self.epoch = b""
        """The store's lifetime as last seen."""

    @classmethod
    async def open(cls, redis_url: str | None = None) -> Store:
        """Open the Redis at ``redis_url``; without one a private child, else memory.

        Raises StoreError when the named Redis is wrong or cannot be reached.
        """
        store = await cls._connect(redis_url)
        try:
            await store._first_ping()
            await store.renew_epoch()
        except SentinelError as error:
            await store.close()
            raise StoreError(str(error)) from error
        except (RedisError, OSError) as error:
            await store.close()
            raise StoreError(f"cannot use the Redis at {store.where}: {error}") from error
        except BaseException:
            await store.close()
            raise
        return store

    @classmethod
    async def _connect(cls, redis_url: str | None) -> Store:
        if redis_url is not None:
            return cls._at(redis_url)
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is not None:
            try:
                child = await RedisChild.start(program)
            except RedisChildError as error:
                log.warning("%s; keeping state in memory instead", error)
            else:
                url = f"unix://{child.socket_path}"
                return cls(StoreKind.CHILD, _client(url), f"a private {program}", child)
        return cls.in_memory()

    async def _first_ping(self) -> None:
        """See that the store answers; a master that is being elected is waited for."""
        if self._sentinels is None:
            await self.redis.ping()
            return
        await self._sentinels.check()
        self._sentinels.start()
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + ELECTION_S
        while True:
            try:
                await self.redis.ping()
                return
            except (RedisError, OSError):
                if loop.time() > give_up_s:
                    raise
            await asyncio.sleep(ELECTION_RETRY_S)

    @classmethod
    def _at(cls, url: str) -> Store:
        try:
            if is_sentinel_url(url):
                address = SentinelAddress.parse(url)
                group = SentinelGroup(address, max_connections=MAX_CONNECTIONS, retry=_retry())
                return cls(StoreKind.REDIS, group.client, str(address), sentinels=group)
        except ValueError as error:
            raise StoreError(f"the Redis address cannot be used: {error}") from error
        try:
            redis = _client(url)
        except ValueError:
            # What redis-py says may quote a piece of a password.
            raise StoreError(f"the Redis address cannot be used; the form is {FORM}") from None
        options = redis.connection_pool.connection_kwargs
        where = options.get("path") or f"{options.get('host')}:{options.get('port')}"
        return cls(StoreKind.REDIS, redis, str(where))

    @classmethod
    def in_memory(cls) -> Store:
        """Return a store in this process's memory; ``renew_epoch`` must be called before use."""
        # Imported here: a server with a real Redis never needs it.
        import fakeredis

        redis = fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer())
        return cls(StoreKind.MEMORY, redis, "this process's memory")

    @property
    def child_pid(self) -> int | None:
        """Process id of the private ``redis-server``, if there is one."""
        return self._child.pid if self._child else None

    @staticmethod
    def key(*parts: str) -> str:
        """Return the name of a key."""
        return ":".join((PREFIX, *parts))

    async def renew_epoch(self) -> bytes:
        """Read the store's epoch, making one if the store has none."""
        key = self.key("epoch")
        await self.redis.set(key, secrets.token_hex(8), nx=True)
        epoch = await self.redis.get(key)
        if not isinstance(epoch, bytes):
            raise StoreError(f"the store at {self.where} does not keep what is written to it")
        self.epoch = epoch
        return epoch

    async def close(self) -> None:
        """Close all connections and end the private child. Idempotent."""
        await asyncio.shield(self._close())

    async def _close(self) -> None:
        await self.redis.aclose()
        if self._sentinels is not None:
            await self._sentinels.close()
        if self._child is not None:
            await self._child.close()
            self._child = None


@contextlib.contextmanager
def reaching() -> Iterator[None]:
    """Turn what redis-py raises into StoreUnavailable."""
    try:
        yield
    except (RedisError, OSError) as error:
        raise StoreUnavailable(f"the store does not answer: {error}") from error


def _client(url: str) -> Redis:
    return Redis.from_url(
        url,
        socket_connect_timeout=CONNECT_TIMEOUT_S,
        socket_timeout=REPLY_TIMEOUT_S,
        max_connections=MAX_CONNECTIONS,
        retry=_retry(),
        protocol=2,
    )


def _retry() -> Retry:
    # Every write of ours may be repeated: explicit stream ids, sorted sets, plain values.
    return Retry(NoBackoff(), 1)
