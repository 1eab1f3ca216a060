"""The servers that share a store: which of them live, and which turns each of them runs.

Keys (all with a time to live)::

    replicas              sorted set: replica id by when it was last seen, Unix seconds; 0: it left
    replica:<id>          there while the replica lives: it renews it several times a second
    replica:<id>:turns    set: the turns it runs

A replica is dead when its key is gone at two looks in a row, with the store answering between them:
after a store that stood still, everybody's key has run out, and everybody gets time to renew it.
After one that did not answer they get a lease's time: each has to find it, or its heir, again.
"""

from __future__ import annotations

import secrets
import time
from enum import Enum
from typing import Any

from server.store import Store, StoreUnavailable

__all__ = ["HEARTBEAT_S", "LEASE_S", "OPEN_KEEP_S", "Replicas"]

OPEN_KEEP_S = 24 * 3600
"""Life of what belongs to a turn that has not ended: longer than any turn."""
HEARTBEAT_S = 0.4
LEASE_S = 1.8
"""A replica that was silent for so long is taken for dead."""


class _State(Enum):
    ALIVE = "alive"
    ABSENT = "absent"
    """It has shown no sign of life lately."""
    LEFT = "left"
    """It said that it ends."""


class Replicas:
    """This process among those that share the store. Methods raise what redis-py raises."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.id = secrets.token_hex(8)
        """Names this process in the store."""
        self._absent: set[str] = set()
        self._doubt_ends_s = 0.0
        self._left = False

    async def beat(self) -> bool:
        """Say that this replica lives; return False if the store had taken it for dead."""
        if self._left:
            return True
        pipe = self._store.redis.pipeline(transaction=False)
        pipe.exists(self.key(self.id))
        pipe.set(self.key(self.id), b"1", px=int(LEASE_S * 1e3))
        pipe.zadd(self._store.key("replicas"), {self.id: int(time.time())})
        pipe.expire(self._store.key("replicas"), OPEN_KEEP_S)
        found, *_ = await pipe.execute()
        return bool(found)

    async def leave(self) -> None:
        """Say that this replica ends: others need not wait to take over what it has not ended."""
        self._left = True
        pipe = self._store.redis.pipeline(transaction=True)
        pipe.delete(self.key(self.id))
        pipe.zadd(self._store.key("replicas"), {self.id: 0}, xx=True)
        await pipe.execute()

    async def lives(self, replica_id: str) -> bool:
        """Return whether a replica has shown a sign of life lately."""
        return bool(await self._store.redis.exists(self.key(replica_id)))

    async def others(self) -> int:
        """Return how many other replicas live."""
        alive = await self._look()
        return sum(state is _State.ALIVE for state in alive.values())

    def doubt(self) -> None:
        """The store did not answer: nobody can be told dead from cut off for a while."""
        self._absent = set()
        self._doubt_ends_s = time.monotonic() + LEASE_S

    @property
    def _doubts(self) -> bool:
        return time.monotonic() < self._doubt_ends_s

    def check_doubt(self) -> None:
        """Raise StoreUnavailable while what is not in the store may yet be written again."""
        if self._doubts:
            raise StoreUnavailable("the store was away, and others may not have found it yet")

    async def dead(self) -> list[str]:
        """Return the replicas that left, and those that were found dead twice in a row."""
        states = await self._look()
        left = {replica for replica, state in states.items() if state is _State.LEFT}
        if self._doubts:
            return sorted(left)
        absent = {replica for replica, state in states.items() if state is _State.ABSENT}
        dead, self._absent = absent & self._absent, absent
        return sorted(left | dead)

    async def _look(self) -> dict[str, _State]:
        known: Any = await self._store.redis.zrange(
            self._store.key("replicas"), 0, -1, withscores=True
        )
        seen = {one.decode(): at_s for one, at_s in known if one.decode() != self.id}
        if not seen:
            return {}
        found = await self._store.redis.mget([self.key(one) for one in seen])
        states = {}
        for (replica, at_s), value in zip(seen.items(), found, strict=True):
            gone = _State.ABSENT if at_s else _State.LEFT
            states[replica] = _State.ALIVE if value is not None else gone
        return states

    async def turns(self, replica_id: str) -> list[str]:
        """Return the turns that a replica began or took over and did not end."""
        members: Any = await self._store.redis.smembers(self.turns_key(replica_id))
        return sorted(one.decode() for one in members)

    async def forget(self, replica_id: str) -> None:
        """Strike a dead replica off: all of its turns have been seen to."""
        pipe = self._store.redis.pipeline(transaction=True)
        pipe.zrem(self._store.key("replicas"), replica_id)
        pipe.delete(self.turns_key(replica_id))
        await pipe.execute()

    def key(self, replica_id: str) -> str:
        """Return the key that is there while a replica lives."""
        return self._store.key("replica", replica_id)

    def turns_key(self, replica_id: str) -> str:
        """Return the key of the set of a replica's turns."""
        return self._store.key("replica", replica_id, "turns")
