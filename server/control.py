"""What one server asks of the one that runs a turn: to end it, or to know that it is watched.

Both lie in the store, where they wait for whoever runs the turn now or takes it over next; a lost
message would be a cancel that never comes.

Keys (with a time to live)::

    cancels                 set: turns that are to end
    turn:<id>:watched       there while somebody follows the turn on a server that does not run it
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

from redis.exceptions import RedisError

from server.background import asked_to_end, end
from server.errors import ApiError
from server.journals import Journals
from server.store import Store, StoreError, reaching
from server.stored_log import is_terminal
from server.turn import Turn
from server.turns import Turns

__all__ = ["Control", "Watch", "watched_key"]

log = logging.getLogger("millrace.control")

POLL_S = 0.2
"""How soon a cancel from elsewhere is seen."""
CANCELS_KEEP_S = 24 * 3600
WATCH_S = 1.0
WATCHED_KEEP_MS = 3000
CANCEL_PATIENCE_S = 20.0
"""Longest wait for a turn's end: a take-over may have to come first."""


class Watch:
    """Somebody watches a turn, until ``close``."""

    def __init__(self, turn: Turn | None, task: asyncio.Task[None] | None) -> None:
        self._turn = turn
        self._task = task
        if turn is not None:
            turn.attach()

    def left(self) -> None:
        """The client left before the turn's end: its contract applies, and this is closed."""
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.detach()

    def close(self) -> None:
        """Watch no more. Idempotent."""
        self._turn = None
        if self._task is not None:
            self._task.cancel()


class Control:
    """Cancels turns wherever they run, and sees to the cancels that others ask for."""

    def __init__(self, store: Store, journals: Journals, turns: Turns) -> None:
        self._store = store
        self._journals = journals
        self._turns = turns
        self._ending: set[str] = set()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look for cancels."""
        self._task = asyncio.create_task(self._poll_forever(), name="control-poll")

    async def close(self) -> None:
        """Stop looking. Idempotent."""
        if self._task is not None:
            await end(self._task)
            self._task = None

    async def cancel(self, turn_id: str) -> None:
        """End a turn wherever it runs and wait for its end. Idempotent.

        Raises StoreError, ApiError 503 when nobody has ended it in time: the cancel stands, and
        asking again waits again.
        """
        turn = self._turns.get(turn_id)
        if turn is not None:
            await turn.cancel()
        if await self._over(turn_id):
            return
        await self.ask(turn_id)
        try:
            async with asyncio.timeout(CANCEL_PATIENCE_S):
                async for batch in self._journals.stored.read(turn_id, -1):
                    if is_terminal(batch[-1]):
                        break
        except TimeoutError:
            raise ApiError(
                503,
                "The turn is to end, but no server has ended it yet; ask again.",
                kind="server_error",
                code="cancel_pending",
                retry_after_s=2,
            ) from None
        with contextlib.suppress(StoreError):
            await self._done([turn_id])

    async def ask(self, turn_id: str) -> None:
        """Ask for a turn's end wherever it runs, without waiting. Raises StoreError."""
        with reaching():
            await self._store.redis.sadd(self._cancels, turn_id)
            await self._store.redis.expire(self._cancels, CANCELS_KEEP_S)

    async def _over(self, turn_id: str) -> bool:
        last = await self._journals.stored.last(turn_id)
        return last is None or is_terminal(last)

    @property
    def _cancels(self) -> str:
        return self._store.key("cancels")

    async def _done(self, turn_ids: list[str]) -> None:
        with reaching():
            await self._store.redis.srem(self._cancels, *turn_ids)

    async def _poll_forever(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if not self._turns.live and not self._ending:
                continue
            try:
                await self._poll()
            except (StoreError, RedisError, OSError) as error:
                log.debug("no look for cancels: %s", error)

    async def _poll(self) -> None:
        members: Any = await self._store.redis.smembers(self._cancels)
        for member in members:
            turn = self._turns.get(member.decode())
            if turn is not None:
                turn.stop()
                self._ending.add(turn.id)
        # A cancel is struck off when the turn has ended: its server may die before that.
        ended = [turn_id for turn_id in self._ending if self._turns.get(turn_id) is None]
        ended = [turn_id for turn_id in ended if await self._over(turn_id)]
        if ended:
            await self._done(ended)
            self._ending.difference_update(ended)

    def watch(self, turn_id: str) -> Watch:
        """Count as one who watches a turn, wherever it runs."""
        turn = self._turns.get(turn_id)
        if turn is not None:
            return Watch(turn, None)
        return Watch(None, asyncio.create_task(self._say_watched(turn_id), name="control-watch"))

    async def _say_watched(self, turn_id: str) -> None:
        key = watched_key(self._store, turn_id)
        while not asked_to_end():
            with contextlib.suppress(RedisError, OSError):
                await self._store.redis.set(key, b"1", px=WATCHED_KEEP_MS)
            await asyncio.sleep(WATCH_S)


def watched_key(store: Store, turn_id: str) -> str:
    """Return the key that is there while a turn is followed on a server that does not run it."""
    return store.key("turn", turn_id, "watched")
