"""Who watches a turn, and what happens when nobody does any more: the disconnect contract.

``finish``: the turn runs on. ``cancel``: it ends. ``linger``: it ends if nobody has come back
within so many seconds, on this server or another one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from server.request import OnDisconnect
from server.store import StoreError

__all__ = ["TAKEOVER_LINGER_S", "Audience"]

TAKEOVER_LINGER_S = 30.0
"""A turn whose server died lost its clients by no wish of theirs: they get so long to come back."""
LOOK_S = 1.0
"""How often a turn that is watched from elsewhere looks whether it still is."""


class Audience:
    """The clients that watch one turn; whoever starts it is the first.

    Args:
        stop: asks for the turn's end.
        watched: tells whether somebody follows the turn on another server.
        count: is told (contract, outcome) of each time that the last client left.
    """

    def __init__(
        self,
        contract: OnDisconnect,
        linger_s: float,
        *,
        stop: Callable[[], None],
        watched: Callable[[], Awaitable[bool]],
        count: Callable[[str, str], None],
    ) -> None:
        self._contract = contract
        self._linger_s = linger_s
        self._stop = stop
        self._watched = watched
        self._count = count
        self._size = 1
        self._ended = False
        self._timer: asyncio.Task[None] | None = None

    def join(self) -> None:
        """One more client watches."""
        self._size += 1
        if self._timer is not None:
            self._drop_timer()
            self._count(self._contract, "resumed")

    def leave(self) -> None:
        """A client left before the turn's end."""
        self._size -= 1
        if self._size > 0 or self._ended:
            return
        if self._contract == "finish":
            self._count("finish", "ran_on")
        elif self._contract == "cancel":
            self._count("cancel", "cancelled")
            self._stop()
        else:
            self._linger(self._linger_s)

    def orphan(self) -> None:
        """The turn was taken over from a dead server, and nobody has come back yet."""
        self._size = 0
        if self._contract != "finish":
            self._linger(max(self._linger_s, TAKEOVER_LINGER_S))

    def close(self) -> None:
        """The turn has ended."""
        self._ended = True
        if self._timer is not None:
            self._drop_timer()
            self._count(self._contract, "finished")

    def _linger(self, linger_s: float) -> None:
        self._timer = asyncio.create_task(self._wait(linger_s), name="turn-linger")

    def _drop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _wait(self, linger_s: float) -> None:
        resumed = False
        while True:
            await asyncio.sleep(linger_s)
            if not await self._is_watched():
                break
            if not resumed:
                resumed = True
                self._count(self._contract, "resumed")
            while await self._is_watched():  # noqa: ASYNC110 (the watcher is another process)
                await asyncio.sleep(LOOK_S)
        self._timer = None
        self._count(self._contract, "cancelled")
        self._stop()

    async def _is_watched(self) -> bool:
        try:
            return await self._watched()
        except StoreError:
            return True  # Nobody can come back to a store that is away: that is not their fault.
