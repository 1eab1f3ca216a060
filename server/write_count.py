"""How many writes of this replica the store has: the sign that it lost some.

A Redis replica that becomes master, or a Redis that comes back from its disk, has a beginning of
the history: the last writes may be gone, and nothing says so. A log that is written on has a gap.
So every write of the logs also sets a count, in the same transaction, and reads what it was before:
the store that has less than was confirmed has lost what came after.
"""

from __future__ import annotations

from typing import Any

from server.replicas import OPEN_KEEP_S
from server.store import Store

__all__ = ["WriteCount"]


class WriteCount:
    """The writes of one replica. Methods raise what redis-py raises."""

    def __init__(self, store: Store, replica_id: str) -> None:
        self._store = store
        self._key = store.key("replica", replica_id, "writes")
        self._confirmed = 0

    def queue(self, pipe: Any) -> None:
        """Add the command to a write's transaction; its reply is for ``settle``."""
        pipe.set(self._key, self._confirmed + 1, get=True, ex=OPEN_KEEP_S)

    def settle(self, reply: bytes | None) -> bool:
        """Count a write; return whether the store had all those before it."""
        before, self._confirmed = self._confirmed, self._confirmed + 1
        # A write that is sent again, since its answer was lost, finds itself.
        return int(reply or 0) >= before

    async def stored(self) -> int:
        """Return how many writes the store has."""
        return int(await self._store.redis.get(self._key) or 0)

    async def lost(self) -> bool:
        """Return whether the store has less than it had confirmed."""
        confirmed = self._confirmed
        return await self.stored() < confirmed

    def count_from(self, number: int) -> None:
        """Expect so many from now on: what was lost is written again."""
        self._confirmed = number
