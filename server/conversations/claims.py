"""Which turn has a conversation: one at a time, on whichever server.

A second is refused with 409 ``conversation_busy``, since which of two answers the other should have
seen is for the client to decide. A turn whose server died keeps its claim until another server goes
on with it or nobody will.

Key: ``conversation:<id>:turn``, who runs a turn on it now: <replica>:<turn>
"""

from __future__ import annotations

from typing import cast

from redis.exceptions import WatchError

from server.errors import ApiError
from server.journals import OPEN_KEEP_S, Journals
from server.store import Store, reaching

__all__ = ["Claims", "busy"]


class Claims:
    """The claims of turns. Every method may raise StoreError."""

    def __init__(self, store: Store, journals: Journals) -> None:
        self._store = store
        self._redis = store.redis
        self._journals = journals

    async def take(self, conversation_id: str, turn_id: str) -> None:
        """Take a conversation for a turn. Raises ApiError 409 while another turn has it."""
        key = self.key(conversation_id)
        mine = self._mine(turn_id)
        with reaching():
            taken = await self._redis.set(key, mine, nx=True, ex=OPEN_KEEP_S)
            if not taken and not await self._take_over(key, mine):
                raise busy(conversation_id)

    async def _take_over(self, key: str, mine: str) -> bool:
        """Take the claim of a dead replica."""
        async with self._redis.pipeline(transaction=True) as pipe:
            try:
                await pipe.watch(key)
                if await self.holds(cast(bytes | None, await pipe.get(key))):
                    return False
                pipe.multi()  # type: ignore[no-untyped-call]
                pipe.set(key, mine, ex=OPEN_KEEP_S)
                await pipe.execute()
            except WatchError:
                return False
        return True

    async def holds(self, holder: bytes | None) -> bool:
        """Return whether the claim with this value is one of a turn that runs or will go on."""
        replica, _, turn_id = holder.decode().partition(":") if holder else ("", "", "")
        if await self._journals.lives(replica):
            return True
        # Or another server is about to go on with it.
        return bool(turn_id) and not await self._journals.stored.abandoned(turn_id)

    async def adopt(self, conversation_id: str, turn_id: str) -> None:
        """Hold for this server the claim of a turn that it has taken over."""
        key = self.key(conversation_id)
        with reaching():
            async with self._redis.pipeline(transaction=True) as pipe:
                try:
                    await pipe.watch(key)
                    holder = cast(bytes | None, await pipe.get(key))
                    if holder is None or holder.decode().partition(":")[2] != turn_id:
                        return
                    pipe.multi()  # type: ignore[no-untyped-call]
                    pipe.set(key, self._mine(turn_id), ex=OPEN_KEEP_S)
                    await pipe.execute()
                except WatchError:
                    return

    async def release(self, conversation_id: str, turn_id: str) -> None:
        """Give a conversation back, if ``turn_id`` has it."""
        key = self.key(conversation_id)
        with reaching():
            if await self._redis.get(key) == self._mine(turn_id).encode():
                await self._redis.delete(key)

    def key(self, conversation_id: str) -> str:
        """Return the name of a conversation's claim."""
        return self._store.key("conversation", conversation_id, "turn")

    def _mine(self, turn_id: str) -> str:
        return f"{self._journals.replica_id}:{turn_id}"


def busy(conversation_id: str) -> ApiError:
    """Return the 409 of a conversation on which a turn runs."""
    return ApiError(
        409,
        f"A response is being made in the conversation '{conversation_id}'.",
        code="conversation_busy",
        param="conversation",
    )
