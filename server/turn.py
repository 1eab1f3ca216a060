"""One turn: request -> engine -> decoder -> journal -> exactly one terminal event.

A turn is one task (and one more a choice where there are several). Whatever ends it (the model, a
stop string, a limit, a client, a dead engine, the server's drain), the task appends the terminal
event, waits until it is written, and takes itself out of the registry.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Sequence
from enum import Enum
from typing import Any, Protocol

import msgspec

from engine import Delta, EngineClosed, EngineDied, FinishReason, RequestError, Tokenizer
from server.agent.rounds import Results, ToolRounds
from server.audience import Audience
from server.choice import Phase, prompt_event
from server.crash import log_crash
from server.ending import Ending, terminal_event
from server.errors import ApiError
from server.events import (
    Event,
    ResponseCreated,
    ResponseFailed,
    ResponseInProgress,
    ResponseQueued,
)
from server.guard.queue import Place
from server.journal import (
    Entry,
    Journal,
    JournalBroken,
    JournalMismatch,
    JournalMoved,
    JournalState,
)
from server.metering.ledger import Used
from server.metering.metrics import Metrics
from server.prompting import draw_seed, with_tokens_spent
from server.request import TurnRequest
from server.response_object import failed_event, new_id, response_object, usage_object
from server.sequence import Engine, EngineSequence, SequenceMaker
from server.store import StoreError
from server.turn_record import Answered, Generated, TurnWork, decode_notes

__all__ = ["Turn", "TurnHost"]

log = logging.getLogger("millrace.turn")


class TurnHost(Protocol):
    """What a turn needs of whoever runs it."""

    engine: Engine
    tokenizer: Tokenizer
    metrics: Metrics

    async def encode(self, request: TurnRequest) -> list[list[int]]:
        """Return the ids of each prompt. Raises ApiError 400."""

    async def watched(self, turn_id: str) -> bool:
        """Return whether a turn is followed on another server. Raises StoreError."""

    async def keep_end(self, request: TurnRequest, response: dict[str, Any]) -> None:
        """Store a turn's end if it is to be kept. Raises StoreError."""

    def begun(self, turn: Turn) -> None:
        """Take note of a turn's first token."""

    def forget(self, turn: Turn) -> None:
        """Take an ended turn out of the registry."""


class _State(Enum):
    RUNNING = "running"
    ENDING = "ending"
    ENDED = "ended"


class Turn:
    """A turn of this process, made by ``Turns.start``.

    ``id`` is the response's id; ``request`` what was asked; ``created_at`` Unix seconds; ``model``
    the served model's name.
    """

    def __init__(
        self,
        host: TurnHost,
        request: TurnRequest,
        arrived_s: float,
        created_at: int | None = None,
    ) -> None:
        self.id = request.turn_id or new_id("resp")
        self.request = msgspec.structs.replace(request, turn_id=self.id)
        self.created_at = int(time.time()) if created_at is None else created_at
        self.model = host.engine.info.name
        self._host = host
        self._engine = host.engine
        self._tokenizer = host.tokenizer
        self._arrived_s = arrived_s
        self._journal: Journal
        self._sequences: list[EngineSequence] = []
        """All that were begun: a round of tools adds one."""
        self._maker: SequenceMaker
        self._tool_items: list[tuple[int, dict[str, Any]]] = []
        """What the server's own tools said, with the items' ``output_index``."""
        self._rounds = ToolRounds(self.request)
        self._rounds_over = False
        """The model is not asked again."""
        self._tools_again = False
        """The calls that are open may have been run by the server that died."""
        self._out_of_room = False
        """The model was to go on after its tools, but a limit is reached."""
        self._prompts_shown: list[asyncio.Event] = []
        self._state = _State.RUNNING
        self._cancelled = False
        self._expired = False
        """No token came before the request's deadline."""
        self._moved = False
        self._ending: Ending | None = None
        """What the turn was about to end with when its server died."""
        self._begun = False
        self._counted = False
        self._task: asyncio.Task[None] | None = None
        self._last_token_s: float | None = None
        self._work: TurnWork
        self.audience = Audience(
            request.on_disconnect,
            request.linger_s,
            stop=self.stop,
            watched=lambda: host.watched(self.id),
            count=host.metrics.disconnected,
        )
        self.response: dict[str, Any] = {}
        """The response object as of the latest event that carries it."""

    # For transports

    def batches(self, after: int | None = None) -> AsyncIterator[list[Entry]]:
        """Yield what follows sequence number ``after`` (None: all), several entries at a time."""
        return self._journal.follow(after)

    async def follow(self, after: int | None = None) -> AsyncIterator[Event]:
        """Yield the events after sequence number ``after``, to the terminal event inclusive."""
        async for batch in self._journal.follow(after):
            for entry in batch:
                yield entry.event

    async def cancel(self) -> None:
        """End the turn with ``response.cancelled`` and wait for its end. Idempotent."""
        self.stop()
        await self.ended()

    def attach(self) -> None:
        """One more client follows the turn."""
        self.audience.join()

    def detach(self) -> None:
        """A client left: after the last one, ``request.on_disconnect`` applies."""
        self.audience.leave()

    async def ended(self) -> None:
        """Wait until the terminal event is written and everything is released."""
        if self._task is not None:
            await asyncio.wait([self._task])

    def stop(self) -> None:
        """Ask for the turn's end with ``response.cancelled``, without waiting for it."""
        if self._state is _State.RUNNING and not self._cancelled and not self._moved:
            self._cancelled = True
            # A task that is cancelled before it begins never runs, and would owe the terminal
            # event; it looks at the flag when it begins.
            if self._begun and self._task is not None:
                self._task.cancel()

    # Beginning

    def prepare(self, prompts: Sequence[list[int]], seed: int | None = None) -> None:
        """Make the sequences. Nothing is submitted yet. Raises ApiError 400.

        ``seed`` is the one that was drawn when the turn began elsewhere.
        """
        request = self.request
        if seed is None:
            seed = draw_seed() if request.sampling.seed is None else request.sampling.seed
        self._work = TurnWork(
            request=request, prompts=list(prompts), seed=seed, created_at=self.created_at
        )
        self._maker = SequenceMaker(
            self.id, self._tokenizer, self._engine.info, seed, self._arrived_s
        )
        self._sequences = self._maker.all(request, prompts)
        self._prompts_shown = [asyncio.Event() for _ in prompts]
        self.response = response_object(
            self.id, self.created_at, self.model, {**request.response_fields, "seed": seed}
        )

    async def submit(self) -> None:
        """Hand the sequences to the engine. Raises EngineError; nothing is left running then."""
        try:
            for sequence in self._sequences:
                sequence.submit(self._engine)
        except BaseException:
            await self.leave()
            raise

    async def leave(self) -> None:
        """Abort what the engine still does for this turn."""
        for sequence in self._sequences:
            await sequence.leave()

    @property
    def work(self) -> TurnWork:
        """All that another server needs to begin this turn again."""
        return self._work

    def begin(self, journal: Journal) -> None:
        """Append the first events and run."""
        self._open(journal)
        self._launch()

    async def rehearse(self, journal: Journal) -> None:
        """Come to the state that the journal's log tells of.

        Raises JournalMismatch, RequestError.
        """
        log = journal.entries()
        self._open(journal)
        for entry in log:
            for note in decode_notes(entry.notes) if entry.notes is not None else ():
                if isinstance(note, Ending):
                    self._ending = note
                    continue
                if isinstance(note, Answered):
                    results = self._rounds.repeat(self._round_items(), note.items)
                    if results is None:
                        raise JournalMismatch(f"{self.id} made other calls than were answered")
                    await self._take_results(results)
                    continue
                sequence = self._sequences[note.number]
                sequence.known_ids += note.delta.token_ids
                self._take(sequence, note.delta)
        if self._ending is None and not journal.rehearsed:
            raise JournalMismatch(f"the log of {self.id} has more than was generated for it")

    async def go_on(self) -> None:
        """Run after ``rehearse``: the engine takes up what is unfinished. Raises EngineError."""
        if self._ending is None:
            self._tools_again = self._sequences[-1].choice.phase is Phase.CLOSED
            try:
                for sequence in self._sequences:
                    sequence.go_on(self._engine)
            except BaseException:
                await self.leave()
                raise
        self._launch()

    def fail(self, journal: Journal, code: str, message: str) -> None:
        """End a turn that was taken over but cannot go on."""
        self._journal = journal
        journal.on_moved = self._on_moved
        journal.give_up_rehearsal()
        # What they came to is not what the log says.
        self._sequences, self._tool_items = [], []
        self._ending = Ending("failed", (code, message))
        self._launch()

    def _launch(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"turn-{self.id}")
        # A turn that was taken over has all of its time again: clocks of two servers may differ.
        if (deadline_s := self.request.sampling.deadline_s) is not None and self._is_waiting:
            left_s = self._arrived_s + deadline_s - time.monotonic()
            timer = asyncio.get_running_loop().call_later(max(0.0, left_s), self._expire)
            self._task.add_done_callback(lambda _: timer.cancel())

    def _open(self, journal: Journal) -> None:
        self._journal = journal
        journal.on_moved = self._on_moved
        journal.append(ResponseCreated(response=self.response))
        journal.append(ResponseInProgress(response=self.response))
        if self._shows_prompts and self.request.sampling.prompt_logprobs is None:
            for sequence in self._sequences[:: self.request.n]:
                self._show_prompt(sequence, None)

    def _expire(self) -> None:
        if self._is_waiting:
            self._expired = True
            self.stop()

    def show_place(self, place: Place) -> None:
        """Append where the turn stands in the queue, as long as it has no token."""
        if self._is_waiting and self._journal.state is JournalState.OPEN:
            self._journal.append(ResponseQueued(place=place.place, wait_s=place.wait_s))

    @property
    def _is_waiting(self) -> bool:
        """Whether it has no token, and nothing ends it."""
        if self._state is not _State.RUNNING or self._cancelled or self._ending is not None:
            return False
        if self._last_token_s is not None:
            return False
        return not any(sequence.choice.num_tokens for sequence in self._sequences)

    @property
    def used(self) -> Used | None:
        """The tokens it used so far; None: another server runs it and will count them."""
        return None if self._moved else Used(*self._usage())

    async def hand_over(self) -> None:
        """Stop, and leave the turn to another server as it is; what is ending already ends here."""
        if self._state is _State.RUNNING and not self._cancelled and not self._moved:
            self._journal.leave()
            self._on_moved()
        await self.ended()

    def _on_moved(self) -> None:
        """Another server runs the turn now: stop, and leave its end to that one."""
        self._moved = True
        if self._begun and self._task is not None:
            self._task.cancel()

    # Running

    async def _run(self) -> None:
        try:
            ending = await self._serve()
            self._state = _State.ENDING
            await self._end(ending)
        except JournalMoved:
            self._count("moved")
        except JournalBroken as error:
            log.warning("%s", error)
            await self._end_badly("store_unavailable", "The event store failed.")
        except Exception as error:
            log_crash(log, self.id, error)
            await self._end_badly("server_error", "The server failed; see its log.")
        finally:
            await self.leave()
            await self._journal.written()
            self._state = _State.ENDED
            self.audience.close()
            self._host.forget(self)

    async def _serve(self) -> Ending:
        """Take what the engine sends until all sequences are closed."""
        self._begun = True
        if self._moved:
            raise JournalMoved(self.id)
        if self._ending is not None:
            return self._ending
        if self._cancelled:
            return self._stopped()
        try:
            if self._rounds_possible:
                await self._pump_rounds()
            else:
                await self._pump_all()
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None:
                task.uncancel()
            if self._moved:
                raise JournalMoved(self.id) from None
            return self._stopped()
        except EngineDied:
            return Ending("failed", ("engine_died", "The engine died; send the request again."))
        except EngineClosed:
            return Ending("failed", ("engine_closed", "The engine was shut down."))
        except RequestError as error:
            return Ending("failed", ("request_refused", str(error)))
        cut = any(sequence.choice.finish_reason == "length" for sequence in self._sequences)
        if cut or self._out_of_room:
            return Ending("incomplete", reason="max_output_tokens")
        return Ending("completed")

    @property
    def _rounds_possible(self) -> bool:
        return len(self._sequences) == 1 or bool(self.request.tools.builtin)

    async def _pump_rounds(self) -> None:
        """Serve one sequence and, while it calls the server's own tools, the next one."""
        while not self._rounds_over:
            sequence = self._sequences[-1]
            await self._pump(sequence)
            if sequence.choice.finish_reason != "tool_calls" or not self.request.tools.builtin:
                return
            # In a thread: the clock reads files.
            results = await asyncio.to_thread(
                self._rounds.run, self._round_items(), again=self._tools_again
            )
            self._tools_again = False
            if results is None:
                return
            following = await self._take_results(results)
            if following is not None:
                following.submit(self._engine)

    def _round_items(self) -> list[dict[str, Any]]:
        return [item for _, item in self._sequences[-1].choice.items.bodies()]

    async def _take_results(self, results: Results) -> EngineSequence | None:
        """Append what the tools said; return what the model is asked next, not yet submitted."""
        first_index = self._sequences[-1].choice.items.next_index
        self._journal.note(Answered(results.items))
        for event in results.events(first_index):
            self._journal.append(event)
        self._tool_items += enumerate(results.items, start=first_index)
        following = None
        if results.request is not None:
            following = await self._next(results.request, first_index + len(results.items))
            self._out_of_room = following is None
        self._rounds_over = following is None
        return following

    async def _next(self, request: TurnRequest, first_index: int) -> EngineSequence | None:
        """Ask the model to go on; None: there is no room for another token."""
        spent = sum(sequence.choice.num_tokens for sequence in self._sequences)
        rest = with_tokens_spent(request, spent)
        if rest is None:
            return None
        try:
            [prompt_ids] = await self._host.encode(rest)
        except ApiError as error:
            if error.code == "context_length_exceeded":
                return None
            raise RequestError(error.message) from error
        number = len(self._sequences)
        sequence = self._maker.next(rest, prompt_ids, number, first_index)
        self._prompts_shown.append(asyncio.Event())
        self._sequences.append(sequence)
        return sequence

    def _stopped(self) -> Ending:
        return Ending("incomplete", reason="deadline") if self._expired else Ending("cancelled")

    async def _pump_all(self) -> None:
        pumps = [asyncio.create_task(self._pump(sequence)) for sequence in self._sequences]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, sequence: EngineSequence) -> None:
        choice = sequence.choice
        shown = self._prompts_shown[choice.index // self.request.n]
        wait_for_prompt = self._shows_prompts and choice.index % self.request.n > 0
        async for delta in sequence.deltas():
            if delta.finish_reason is FinishReason.ABORT and choice.phase is not Phase.CLOSED:
                raise RequestError("the engine gave this request up")
            self._time(len(delta.token_ids))
            if wait_for_prompt:
                await shown.wait()
            self._take(sequence, delta)
            if choice.phase is Phase.CLOSED and delta.finish_reason is None:
                # A stop string was found. The engine's last delta still brings the usage.
                self._engine.abort(sequence.request.request_id)

    def _take(self, sequence: EngineSequence, delta: Delta) -> None:
        """Append what a delta says, and store the delta beside it."""
        number = sequence.choice.index
        self._journal.note(Generated(number, msgspec.structs.replace(delta, request_id="")))
        if self._shows_prompts and number % self.request.n == 0:
            self._show_prompt(sequence, delta)
        for event in sequence.choice.feed(delta):
            self._journal.append(event)

    @property
    def _shows_prompts(self) -> bool:
        request = self.request
        wants_logprobs = request.sampling.prompt_logprobs is not None
        return request.return_token_ids or request.echo or wants_logprobs

    def _show_prompt(self, sequence: EngineSequence, delta: Delta | None) -> None:
        shown = self._prompts_shown[sequence.choice.index // self.request.n]
        if shown.is_set():
            return
        shown.set()
        logprobs = delta.prompt_logprobs if delta is not None else None
        if delta is not None and logprobs is None and self.request.sampling.prompt_logprobs:
            logprobs = []
        self._journal.append(
            prompt_event(self._tokenizer, sequence.choice.index, sequence.prompt_ids, logprobs)
        )

    def _time(self, num_tokens: int) -> None:
        if not num_tokens:
            return
        now = time.monotonic()
        metrics = self._host.metrics
        if self._last_token_s is None:
            metrics.first_token(now - self._arrived_s)
            self._host.begun(self)
        elif len(self._sequences) == 1:
            metrics.inter_token(now - self._last_token_s, num_tokens)
        self._last_token_s = now

    # Ending

    async def _end(self, ending: Ending) -> None:
        self._journal.note(ending)
        for sequence in self._sequences:
            for event in sequence.choice.break_off():
                self._journal.append(event)
        # What is unfinished leaves the engine now, not after the store has answered.
        await self.leave()
        response = self._final(ending)
        try:
            await self._host.keep_end(self.request, response)
        except StoreError as error:
            log.error("cannot store %s: %s", self.id, error)
            ending = Ending("failed", ("store_unavailable", "The answer could not be stored."))
            response = self._final(ending)
        self.response = response
        self._count(ending.status)
        self._journal.append(terminal_event(ending, response))

    def _final(self, ending: Ending) -> dict[str, Any]:
        items = [item for sequence in self._sequences for item in sequence.choice.items.bodies()]
        items = sorted([*items, *self._tool_items], key=lambda numbered: numbered[0])
        details = {"reason": ending.reason} if ending.status == "incomplete" else None
        return {
            **self.response,
            "status": ending.status,
            "completed_at": int(time.time()) if ending.status == "completed" else None,
            "incomplete_details": details,
            "output": [item for _, item in items],
            "usage": usage_object(*self._usage(), self._num_reasoning_tokens()),
        }

    def _usage(self) -> tuple[int, int, int]:
        """Return prompt, cached and completion tokens; a prompt counts once, whatever n is.

        Where tools are called, each time that the model is asked counts.
        """
        firsts = self._sequences[:: self.request.n]
        prompt = sum(len(sequence.prompt_ids) for sequence in firsts)
        usages = [sequence.choice.usage for sequence in firsts]
        cached = sum(usage.cached_tokens for usage in usages if usage is not None)
        completion = sum(sequence.choice.num_tokens for sequence in self._sequences)
        return prompt, cached, completion

    def _num_reasoning_tokens(self) -> int:
        return sum(sequence.choice.items.num_reasoning_tokens for sequence in self._sequences)

    async def _end_badly(self, code: str, message: str) -> None:
        """End a turn that a fault stopped: whoever follows it still gets a terminal event."""
        self._count("failed")
        self._journal.give_up_rehearsal()
        event = self.failure(code, message)
        try:
            await self._host.keep_end(self.request, event.response)
        except Exception as error:
            log_crash(log, self.id, error)
        if self._journal.state is JournalState.OPEN:
            self._journal.append(event)

    def failure(self, code: str, message: str) -> ResponseFailed:
        """Return the terminal event that ends this turn with an error."""
        return failed_event(self.response, code, message)

    def _count(self, status: str) -> None:
        if self._counted:
            return
        self._counted = True
        prompt, cached, completion = self._usage()
        self._host.metrics.turn_ended(
            dialect=self.request.dialect,
            status=status,
            prompt_tokens=prompt,
            cached_tokens=cached,
            completion_tokens=completion,
            duration_s=time.monotonic() - self._arrived_s,
        )
