"""Lets turns in: the limits of their key, the room in the queue; and keeps the account of each."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from server.errors import ApiError
from server.guard.keys import KeyRing
from server.guard.limits import LEASE_S, Limits, Reserved, minute_of
from server.guard.policy import KeyPolicy
from server.guard.queue import Place, WaitingTurn, WaitingTurns
from server.metering.ledger import Used
from server.metering.metrics import Metrics
from server.request import TurnRequest
from server.store import StoreError

__all__ = ["Gate"]

log = logging.getLogger("millrace.guard")

TELL_S = 1.0
"""How often those who wait are told their place, and the longest silence before the first time."""
_RENEW_S = LEASE_S / 3
_ANY_LIMITS = KeyPolicy(max_turns=1, tokens_per_minute=1)
"""Of a key that was not shown here: whatever may be counted for its turns is kept and put right."""

Tell = Callable[[str, Place], None]


class _Inside(NamedTuple):
    """A turn that was let in."""

    owner: str
    policy: KeyPolicy
    reserved: Reserved


class Gate:
    """All admission of one server. ``tell`` is called with (turn id, place) for those who wait."""

    def __init__(
        self,
        keys: KeyRing,
        limits: Limits,
        waiting: WaitingTurns,
        metrics: Metrics,
    ) -> None:
        self._keys = keys
        self._limits = limits
        self._waiting = waiting
        self._metrics = metrics
        self._inside: dict[str, _Inside] = {}
        self._told: dict[str, Place] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._task: asyncio.Task[None] | None = None

    def headers(self, owner: str) -> dict[str, str]:
        """Return the rate limits of a key as headers."""
        return self._limits.headers(owner)

    def start(self, tell: Tell) -> None:
        """Begin to renew leases and to tell those who wait."""
        self._task = asyncio.create_task(self._tick(tell), name="gate")

    async def close(self) -> None:
        """Stop, and wait until what ended is entered."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await asyncio.gather(*self._settling)

    def check_early(self, owner: str) -> None:
        """Refuse what is known to be over a limit before any work is done. Raises ApiError 429."""
        try:
            self._limits.check_known(owner)
        except ApiError as error:
            self._metrics.refused(error.code or "")
            raise

    def bound(self, request: TurnRequest) -> TurnRequest:
        """Return a request with its key's weight, and its priority within the key's."""
        policy = self._keys.policy(request.owner)
        return msgspec.structs.replace(
            request, weight=policy.weight, priority=max(request.priority, policy.priority)
        )

    async def enter(
        self, turn_id: str, request: TurnRequest, prompts: list[list[int]], room: int
    ) -> None:
        """Let a turn in that went through ``bound``; ``room`` is the model's context.

        Raises ApiError 429 with ``Retry-After``, 400 if its key can never pay it; StoreError.
        """
        policy = self._keys.policy(request.owner)
        turn = _waiting(request, prompts, room)
        try:
            self._waiting.check(turn, request.sampling.deadline_s)
            # Room in the queue is taken before the store is asked: others arrive meanwhile.
            self._waiting.enter(turn_id, turn)
            reserved = await self._limits.take(
                request.owner, policy, turn_id, _expected_tokens(request, prompts)
            )
        except BaseException as error:
            self._waiting.leave(turn_id)
            if isinstance(error, ApiError):
                self._metrics.refused(error.code or "")
            raise
        self._inside[turn_id] = _Inside(request.owner, policy, reserved)
        self._metrics.waiting(len(self._waiting))

    def adopt(
        self,
        turn_id: str,
        request: TurnRequest,
        prompts: list[list[int]],
        room: int,
        created_at: int,
    ) -> None:
        """Let a turn in that another server let in at ``created_at`` (Unix seconds).

        It is never refused, and what was counted for it then is put right when it ends here.
        """
        self._waiting.enter(turn_id, _waiting(request, prompts, room))
        reserved = Reserved(minute_of(created_at), _expected_tokens(request, prompts))
        known = self._keys.knows(request.owner)
        policy = self._keys.policy(request.owner) if known else _ANY_LIMITS
        self._inside[turn_id] = _Inside(request.owner, policy, reserved)
        self._metrics.waiting(len(self._waiting))

    def hand_over(self, turn_id: str) -> None:
        """The turn goes on at another server, which keeps its account from now on."""
        self._waiting.leave(turn_id)
        self._metrics.waiting(len(self._waiting))
        self._told.pop(turn_id, None)
        self._inside.pop(turn_id, None)

    def begun(self, turn_id: str) -> None:
        """The turn has its first token."""
        turn = self._waiting.leave(turn_id)
        self._told.pop(turn_id, None)
        if turn is not None:
            self._metrics.waited(time.monotonic() - turn.since_s)
            self._metrics.waiting(len(self._waiting))

    def leave(self, turn_id: str, used: Used | None) -> None:
        """The turn has ended; None: it did not begin."""
        inside = self._inside.get(turn_id)
        self.hand_over(turn_id)
        if inside is None:
            return
        if used is not None:
            self._waiting.answered(used.completion_tokens)
        if not self._keys.required:
            return  # there is nobody to count for
        task = asyncio.create_task(self._settle(turn_id, inside, used), name="gate-settle")
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, turn_id: str, inside: _Inside, used: Used | None) -> None:
        try:
            if used is None:
                await self._limits.cancel(inside.owner, inside.policy, turn_id, inside.reserved)
            else:
                await self._limits.settle(
                    inside.owner, inside.policy, turn_id, inside.reserved, used
                )
        except StoreError as error:
            log.warning("the use of %s is not entered: %s", turn_id, error)

    async def _tick(self, tell: Tell) -> None:
        renewed_s = time.monotonic()
        while True:
            await asyncio.sleep(TELL_S)
            now_s = time.monotonic()
            self._waiting.measure()
            self._tell(tell, now_s)
            if now_s - renewed_s >= _RENEW_S:
                renewed_s = now_s
                await self._renew()

    def _tell(self, tell: Tell, now_s: float) -> None:
        for turn_id, turn in self._waiting.items():
            if now_s - turn.since_s < TELL_S or turn_id not in self._inside:
                continue
            place = self._waiting.place(turn_id)
            told = self._told.get(turn_id)
            # An estimate that only gets a little better is no news.
            if told is None or told.place != place.place or _differs(told.wait_s, place.wait_s):
                self._told[turn_id] = place
                tell(turn_id, place)

    async def _renew(self) -> None:
        by_owner: dict[str, list[str]] = {}
        for turn_id, inside in self._inside.items():
            if inside.policy.max_turns is not None:
                by_owner.setdefault(inside.owner, []).append(turn_id)
        try:
            for owner, turn_ids in by_owner.items():
                await self._limits.renew(owner, turn_ids)
        except StoreError as error:
            log.warning("leases are not renewed: %s", error)


def _waiting(request: TurnRequest, prompts: list[list[int]], room: int) -> WaitingTurn:
    asked = request.sampling.max_tokens
    num_sequences = len(prompts) * request.n
    now_s = time.monotonic()
    return WaitingTurn(
        owner=request.owner,
        weight=request.weight,
        priority=request.priority,
        prompt_tokens=sum(map(len, prompts)) * request.n,
        max_tokens=num_sequences * (room if asked is None else min(asked, room)),
        num_sequences=num_sequences,
        since_s=now_s,
        due_s=request.due_s(now_s),
    )


def _expected_tokens(request: TurnRequest, prompts: list[list[int]]) -> int:
    """The tokens that are counted for a turn before it has used any."""
    asked = request.sampling.max_tokens or 0
    return sum(map(len, prompts)) + len(prompts) * request.n * asked


def _differs(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is not other
    return abs(one - other) > max(1.0, 0.25 * one)
