"""All turns of this process: admission, start, registry, drain."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence
from typing import Any, Protocol

from engine import EngineError, EngineState, Tokenizer
from server.errors import ApiError, draining
from server.events import ResponseCreated
from server.guard.gate import Gate
from server.guard.queue import Place
from server.journal import Entry, JournalMismatch, JournalMoved
from server.journals import Journals
from server.metering.metrics import Metrics
from server.prompting import Prompter
from server.request import TurnRequest
from server.sequence import Engine
from server.store import Store, StoreError, StoreKind, StoreUnavailable, reaching
from server.turn import Turn
from server.turn_record import TurnWork, keep

__all__ = ["TurnKeeper", "Turns"]

log = logging.getLogger("millrace.turn")

MAX_SEQUENCES = 256
"""Most sequences (prompts times n) of one turn."""
KEEP_RETRY_S = 0.25


class TurnKeeper(Protocol):
    """Where turns that are to be kept are stored (see ``sessions``)."""

    async def begin(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a turn that begins."""

    async def end(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a turn's end, before its terminal event is shown."""

    async def begin_again(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a turn that runs, where the store has lost it."""

    async def adopt(self, request: TurnRequest, turn_id: str) -> None:
        """Hold for this server what a turn had claimed that is taken over."""


class Turns:
    """Starts turns and knows those that run."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        journals: Journals,
        keeper: TurnKeeper,
        metrics: Metrics,
        store: Store,
        *,
        gate: Gate,
        max_live: int = 1024,
        retention_s: int = 30 * 24 * 3600,
        unstored_retention_s: int = 600,
        store_patience_s: float = 10.0,
    ) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.metrics = metrics
        self._store = store
        self._gate = gate
        self.draining = False
        """No new turns are taken; those that run may end."""
        self._journals = journals
        self._keeper = keeper
        self._prompter = Prompter(tokenizer)
        self._max_live = max_live
        self._retention_s = retention_s
        self._unstored_retention_s = unstored_retention_s
        self._store_patience_s = store_patience_s
        self._turns: dict[str, Turn] = {}
        self._starting = 0
        self._abandoned: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def live(self) -> int:
        """Number of turns that run."""
        return len(self._turns)

    def get(self, turn_id: str) -> Turn | None:
        """Return a turn that runs in this process."""
        return self._turns.get(turn_id)

    async def start(self, request: TurnRequest) -> Turn:
        """Start a turn.

        Raises ApiError (400, 429, 503) when it cannot be served; nothing was started then.
        """
        arrived_s = time.monotonic()
        self._admit()
        self._gate.check_early(request.owner)
        request = self._gate.bound(request)
        self._starting += 1
        try:
            return await self._start(request, arrived_s)
        finally:
            self._starting -= 1

    def _admit(self) -> None:
        if self.draining:
            raise draining()
        if len(self._turns) + self._starting >= self._max_live:
            raise ApiError(
                429,
                f"The server is busy with {self._max_live} requests; try again soon.",
                kind="rate_limit_error",
                code="server_busy",
                retry_after_s=2,
            )
        if self.engine.state is not EngineState.READY:
            raise _engine_unavailable(f"the engine is {self.engine.state.value}")

    async def _start(self, request: TurnRequest, arrived_s: float) -> Turn:
        num_sequences = request.n * (1 if request.prompts is None else len(request.prompts))
        if num_sequences > MAX_SEQUENCES:
            raise ApiError(
                400,
                f"The request asks for {num_sequences} answers (prompts times n); at most "
                f"{MAX_SEQUENCES} are allowed.",
                param="n",
            )
        prompts = await self.encode(request)
        turn = Turn(self, request, arrived_s)
        turn.prepare(prompts)
        await self._gate.enter(turn.id, request, prompts, self.engine.info.max_model_len)
        try:
            await turn.submit()
        except EngineError as error:
            self._gate.leave(turn.id, None)
            raise _engine_unavailable(str(error)) from error
        try:
            await self._keep_begin(request, turn)
            if self.draining:
                self._admit()
        except BaseException:
            self._gate.leave(turn.id, None)
            await turn.leave()
            self._abandon(request, turn)
            raise
        keep_s = self._keep_s(request)
        journal = self._journals.open(
            turn.id, keep_s=keep_s, failure=turn.failure, kept=keep(turn.work)
        )
        journal.on_rewritten = lambda: self._keep_again(turn)
        self._enter(turn)
        turn.begin(journal)
        return turn

    def _enter(self, turn: Turn) -> None:
        self._turns[turn.id] = turn
        self._idle.clear()
        self.metrics.turn_started(turn.request.dialect)

    async def take_over(self, work: TurnWork, events: Sequence[Entry], generation: int) -> bool:
        """Go on with a turn whose server died; return whether it goes on.

        Where it cannot, it is ended, with a failure that says why, unless it has left this server
        again already. Raises StoreError.
        """
        request = work.request
        turn = Turn(self, request, time.monotonic(), work.created_at)
        turn.audience.orphan()
        await self._keeper.adopt(request, turn.id)
        journal = self._journals.open(
            turn.id,
            keep_s=self._keep_s(request),
            failure=turn.failure,
            kept=keep(work),
            generation=generation,
            log=events,
        )
        journal.on_rewritten = lambda: self._keep_again(turn)
        room = self.engine.info.max_model_len
        self._gate.adopt(turn.id, request, work.prompts, room, work.created_at)
        self._enter(turn)
        try:
            turn.prepare(work.prompts, work.seed)
            await turn.rehearse(journal)
            await turn.go_on()
        except JournalMoved:
            self.forget(turn)
            return False
        except (ApiError, EngineError, JournalMismatch) as error:
            log.error("%s cannot go on here: %s", turn.id, error)
            first = events[0].event if events else None
            if isinstance(first, ResponseCreated):
                turn.response = first.response
            message = "The server that ran this turn went away, and another could not go on."
            turn.fail(journal, "takeover_failed", message)
            return False
        return True

    def _keep_s(self, request: TurnRequest) -> int:
        return self._retention_s if request.store else self._unstored_retention_s

    async def watched(self, turn_id: str) -> bool:
        """Return whether a turn is followed on another server. Raises StoreError."""
        with reaching():
            found = await self._store.redis.exists(self._store.key("turn", turn_id, "watched"))
        return bool(found)

    async def encode(self, request: TurnRequest) -> list[list[int]]:
        """Return the ids of each prompt. Raises ApiError 400."""
        return await self._prompter.encode(request, self.engine.info)

    async def _keep_begin(self, request: TurnRequest, turn: Turn) -> None:
        if not _kept(request):
            return
        try:
            await self._keeper.begin(request, turn.response)
        except StoreError as error:
            raise ApiError(
                503,
                "The server cannot store the response now.",
                kind="server_error",
                code="store_unavailable",
                retry_after_s=5,
            ) from error

    def _abandon(self, request: TurnRequest, turn: Turn) -> None:
        """End what may be stored of a turn that did not begin: its client left meanwhile."""

        async def end() -> None:
            failed = turn.failure("server_error", "The response was not begun.")
            with contextlib.suppress(StoreError):
                await self.keep_end(request, failed.response)

        task = asyncio.create_task(end(), name=f"abandon-{turn.id}")
        self._abandoned.add(task)
        task.add_done_callback(self._abandoned.discard)

    async def keep_end(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a turn's end if it is to be kept.

        A store that is away gets as long to come back as it has for events: an answer that is
        complete would else be lost to a restart of the store that its events outlive.
        """
        if not _kept(request):
            return
        loop = asyncio.get_running_loop()
        give_up_s = loop.time() + self._store_patience_s
        while True:
            try:
                await self._keeper.end(request, response)
                return
            except StoreUnavailable:
                if loop.time() > give_up_s:
                    raise
                await asyncio.sleep(KEEP_RETRY_S)

    async def _keep_again(self, turn: Turn) -> None:
        """Store what the store lost of a turn besides its log. Raises StoreUnavailable."""
        if not _kept(turn.request):
            return
        try:
            if turn.response["status"] == "in_progress":
                await self._keeper.begin_again(turn.request, turn.response)
            else:
                await self._keeper.end(turn.request, turn.response)
        except StoreUnavailable:
            raise
        except StoreError as error:
            log.error("what the store lost of %s cannot be stored again: %s", turn.id, error)

    def forget(self, turn: Turn) -> None:
        """Take out of the registry a turn that ended or went to another server."""
        if self._turns.pop(turn.id, None) is not None:
            self.metrics.turn_left()
        if (used := turn.used) is None:
            self._gate.hand_over(turn.id)
        else:
            self._gate.leave(turn.id, used)
        journal = self._journals.live(turn.id)
        if journal is not None:
            self._journals.release(journal)
        if not self._turns:
            self._idle.set()

    def begun(self, turn: Turn) -> None:
        """A turn has its first token."""
        self._gate.begun(turn.id)

    def show_place(self, turn_id: str, place: Place) -> None:
        """Tell whoever follows a waiting turn where it stands."""
        if (turn := self._turns.get(turn_id)) is not None:
            turn.show_place(place)

    async def until_idle(self) -> None:
        """Wait until no turn runs."""
        await self._idle.wait()

    async def drain(self, patience_s: float) -> None:
        """Take no new turns, wait for those that run, and leave what runs after ``patience_s``.

        In a store that others share those turns go on: at once where another server lives, else
        when one is started. Otherwise they are cancelled.
        """
        self.draining = True
        try:
            async with asyncio.timeout(patience_s):
                await self._idle.wait()
        except TimeoutError:
            running = list(self._turns.values())
            if self._store.kind is StoreKind.REDIS:
                log.warning("leaving %d turns that still run to other servers", len(running))
                await asyncio.gather(*(turn.hand_over() for turn in running))
                await self._journals.leave()
            else:
                log.warning("cancelling %d turns that still run", len(running))
                await asyncio.gather(*(turn.cancel() for turn in running))
        await asyncio.gather(*self._abandoned)

    def close(self) -> None:
        """Release the encoder's threads."""
        self._prompter.close()


def _kept(request: TurnRequest) -> bool:
    return request.store or request.conversation_id is not None


def _engine_unavailable(reason: str) -> ApiError:
    return ApiError(
        503,
        f"The model cannot be reached now: {reason}.",
        kind="server_error",
        code="engine_unavailable",
        retry_after_s=5,
    )
