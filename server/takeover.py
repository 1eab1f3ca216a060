"""Turns whose server died go on here: finding them, claiming them, bringing them back.

Every server looks for dead ones a few times a second. A turn is claimed by the first entry of its
log's next generation: Redis takes it from one server only, and from then on refuses what an earlier
owner still sends. Then a new ``Turn`` is shown what the old one's engine had sent, checks that the
same events come of it, and the engine goes on behind the tokens that are known.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

import msgspec
from redis.exceptions import RedisError, ResponseError

from engine import EngineState
from server.background import end
from server.crash import log_crash
from server.events import ResponseCreated
from server.journal import Entry
from server.journals import OPEN_KEEP_S, Journals
from server.metering.metrics import Metrics
from server.response_object import failed_event
from server.store import Store, StoreError
from server.stored_log import is_terminal
from server.turn_record import TurnWork, decode_work
from server.turns import Turns

__all__ = ["SCAN_S", "Takeover"]

log = logging.getLogger("millrace.takeover")

SCAN_S = 0.4
OTHER_MODEL_S = 30.0
"""How long a turn waits for a server with its model before one without it ends the turn."""


class Takeover:
    """Looks for turns that nobody runs."""

    def __init__(self, store: Store, journals: Journals, turns: Turns, metrics: Metrics) -> None:
        self._store = store
        self._redis = store.redis
        self._journals = journals
        self._stored = journals.stored
        self._replicas = journals.replicas
        self._turns = turns
        self._metrics = metrics
        self._seen_s: dict[str, float] = {}
        """When a turn that this server cannot go on with was first seen without an owner."""
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.create_task(self._scan_forever(), name="takeover-scan")

    async def close(self) -> None:
        """Stop looking. Idempotent."""
        if self._task is not None:
            await end(self._task)
            self._task = None

    async def _scan_forever(self) -> None:
        while True:
            await asyncio.sleep(SCAN_S)
            try:
                await self.scan()
            except (RedisError, OSError, StoreError) as error:
                self._replicas.doubt()
                log.debug("no look for dead servers: %s", error)
            except Exception as error:
                log_crash(log, "a take-over", error)

    async def scan(self) -> None:
        """Take over what dead servers left, and what this one claimed and never began."""
        if self._turns.draining or self._turns.engine.state is not EngineState.READY:
            return
        for replica in await self._replicas.dead():
            seen_to = [await self._take(turn_id) for turn_id in await self._replicas.turns(replica)]
            if all(seen_to):
                await self._replicas.forget(replica)
        for turn_id in await self._replicas.turns(self._replicas.id):
            await self._take(turn_id)

    async def _take(self, turn_id: str) -> bool:
        """Claim a turn and go on with it; False: it is left for later."""
        if self._journals.holds(turn_id):
            return True
        tail = await self._stored.tail(turn_id)
        owner = await self._stored.owner(turn_id)
        mine = self._replicas.id
        if tail is None or (tail.entry is not None and is_terminal(tail.entry)):
            await self._strike(turn_id, mine)
            return True
        if owner != mine and await self._replicas.lives(owner):
            return True
        data = await self._redis.get(self._stored.work_key(turn_id))
        work = _decoded(data)
        if work is not None and not self._fits(work) and not self._waited(turn_id):
            return False
        generation = tail.generation
        if owner != mine:
            generation += 1
            if not await self._claim(turn_id, generation):
                return True
        await self._go_on(turn_id, work, generation)
        return True

    def _fits(self, work: TurnWork) -> bool:
        return work.request.model == self._turns.engine.info.name

    def _waited(self, turn_id: str) -> bool:
        first_s = self._seen_s.setdefault(turn_id, time.monotonic())
        if time.monotonic() - first_s < OTHER_MODEL_S:
            return False
        del self._seen_s[turn_id]
        return True

    async def _claim(self, turn_id: str, generation: int) -> bool:
        mine = self._replicas.id
        try:
            await self._redis.xadd(
                self._stored.key(turn_id), {"r": mine}, id=f"{generation}-0", nomkstream=True
            )
        except ResponseError as error:
            if "equal or smaller" not in str(error):
                raise
            # Somebody was faster, unless it was this server and the answer was lost.
            if await self._stored.owner(turn_id) != mine:
                return False
        pipe = self._redis.pipeline(transaction=True)
        pipe.sadd(self._replicas.turns_key(mine), turn_id)
        pipe.expire(self._replicas.turns_key(mine), OPEN_KEEP_S)
        await pipe.execute()
        return True

    async def _go_on(self, turn_id: str, work: TurnWork | None, generation: int) -> None:
        entries = await self._stored.entries(turn_id)
        reason = _hopeless(work, entries)
        if turn_id in self._journals.broken_off:
            reason = "its readers have been told that the store failed"
        if reason is None and work is not None and not self._fits(work):
            reason = f"no server with the model '{work.request.model}' is left"
        if work is None or reason is not None:
            log.error("%s cannot be taken over: %s", turn_id, reason)
            self._metrics.taken_over("failed")
            await self._end(turn_id, work, entries, reason or "")
            return
        log.warning("taking over %s after its event %d", turn_id, len(entries) - 1)
        resumed = await self._turns.take_over(work, entries, generation)
        self._metrics.taken_over("resumed" if resumed else "failed")

    async def _end(
        self, turn_id: str, work: TurnWork | None, entries: list[Entry], reason: str
    ) -> None:
        """End a turn that cannot go on, so that its readers hear of it."""
        first = entries[0].event if entries else None
        response = first.response if isinstance(first, ResponseCreated) else {"id": turn_id}
        message = f"The server that ran this turn went away, and {reason}."
        if work is not None:
            failed = failed_event(response, "takeover_failed", message)
            await self._turns.keep_end(work.request, failed.response)
        last = entries[-1].event.sequence_number if entries else -1
        await self._stored.end_abandoned(
            turn_id, last, response=response, code="takeover_failed", message=message
        )
        await self._strike(turn_id, self._replicas.id)

    async def _strike(self, turn_id: str, replica: str) -> None:
        pipe = self._redis.pipeline(transaction=True)
        pipe.srem(self._replicas.turns_key(replica), turn_id)
        pipe.delete(self._stored.work_key(turn_id))
        await pipe.execute()


def _decoded(data: Any) -> TurnWork | None:
    try:
        return None if data is None else decode_work(data)
    except msgspec.MsgspecError:
        return None


def _hopeless(work: TurnWork | None, entries: list[Entry]) -> str | None:
    if work is None:
        return "what it was asked is not stored"
    if [entry.event.sequence_number for entry in entries] != list(range(len(entries))):
        return "part of its event log is lost"
    return None
