"""The requests in flight, as the server's side of the link keeps them: what an engine that dies
leaves to be done, and who may have killed it. No I/O.

A token is delivered once it is here; a new engine is given the request with the tokens delivered so
far and goes on after them. That is exact because the draw at a position depends on nothing but the
seed, the position and the logits.
"""

from __future__ import annotations

import msgspec

from engine.errors import EngineDied, EngineError
from engine.streams import RequestStream
from engine.types import Delta, FinishReason, Request, Usage

__all__ = ["MAX_STRIKES", "InFlight"]

MAX_STRIKES = 3
"""A request that saw so many engines in a row die before it was proven harmless is given up."""
_PROOF_TOKENS = 4
"""So many tokens of one engine prove a request harmless. One token would not: it comes from reading
the prompt, and generating is another way through the engine, in which it may die each time."""
_SUSPECT = 2
"""From so many on the next engine is given one request at a time, so that it is clear which one
kills it: a request that does must not take the others with it, nor the engine for ever."""


class _Flight:
    """One request, from its submission to its last delta."""

    __slots__ = ("aborted", "num_brought", "output_ids", "request", "stream", "strikes")

    def __init__(self, request: Request, stream: RequestStream) -> None:
        self.request = request
        self.stream = stream
        self.output_ids = list(request.output_ids)
        self.num_brought = 0
        """Tokens the living engine brought."""
        self.strikes = 0
        self.aborted = False

    @property
    def proven(self) -> bool:
        """Whether this engine computed it for a while and lived."""
        return self.num_brought >= _PROOF_TOKENS

    def rest(self) -> Request:
        """What an engine is asked for: to go on after what was delivered."""
        return msgspec.structs.replace(self.request, output_ids=list(self.output_ids))

    def end_as_aborted(self) -> None:
        """End its stream without an engine."""
        self.stream.push(
            Delta(
                request_id=self.request.request_id,
                token_ids=[],
                finish_reason=FinishReason.ABORT,
                usage=Usage(len(self.request.prompt_ids), 0, len(self.output_ids), 0),
            )
        )


class InFlight:
    """Requests in order of submission, with what was delivered of each."""

    def __init__(self) -> None:
        self._flights: dict[str, _Flight] = {}
        self._waiting: dict[str, _Flight] = {}
        """Those of them that the living engine does not have."""
        self._careful = False
        self._on_trial: _Flight | None = None

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._flights

    @property
    def num_submitted(self) -> int:
        """Requests that the living engine has."""
        return len(self._flights) - len(self._waiting)

    def add(self, request: Request, stream: RequestStream) -> None:
        """Take a request with an id that is not in use; ``due`` names it when it is to go out."""
        flight = _Flight(request, stream)
        self._flights[request.request_id] = self._waiting[request.request_id] = flight

    def due(self) -> list[Request]:
        """Return what the engine is to be given now; it counts as submitted from here on."""
        if self._careful:
            tried = self._on_trial
            if tried is not None and not tried.proven:
                return []
            self._on_trial = next(iter(self._waiting.values()), None)
            if self._on_trial is not None:
                del self._waiting[self._on_trial.request.request_id]
                return [self._on_trial.rest()]
            self._careful = False
        requests = [flight.rest() for flight in self._waiting.values()]
        self._waiting.clear()
        return requests

    def deliver(self, delta: Delta) -> bool:
        """Hand a delta of the living engine to its stream; False if nobody waits for it."""
        flight = self._flights.get(delta.request_id)
        if flight is None:
            return False
        flight.output_ids += delta.token_ids
        flight.num_brought += len(delta.token_ids)
        if delta.finish_reason is not None:
            self._forget(flight)
        flight.stream.push(delta)
        return True

    def abort(self, request_id: str) -> bool:
        """End a request as aborted; True if the engine has it and must be asked."""
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        if request_id in self._waiting:
            self._forget(flight)
            flight.end_as_aborted()
            return False
        flight.aborted = True
        return True

    def drop(self, request_id: str) -> bool:
        """Forget a request whose reader left; True if the engine has it and must be told."""
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        submitted = request_id not in self._waiting
        self._forget(flight)
        return submitted

    def engine_died(self) -> int:
        """Note that no engine has anything any more; returns how many requests were given up.

        Those that were aborted end so; those that were in flight too often when an engine died
        fail with EngineDied. All others are due again.
        """
        given_up = 0
        for request_id, flight in list(self._flights.items()):
            if request_id not in self._waiting:
                flight.strikes = 1 if flight.proven else flight.strikes + 1
            flight.num_brought = 0
            if flight.aborted:
                self._forget(flight)
                flight.end_as_aborted()
            elif flight.strikes >= MAX_STRIKES:
                self._forget(flight)
                given_up += 1
                flight.stream.fail(
                    EngineDied(f"{MAX_STRIKES} engine processes died while they computed this")
                )
        self._on_trial = None
        self._waiting = dict(self._flights)
        self._careful = any(flight.strikes >= _SUSPECT for flight in self._flights.values())
        return given_up

    def fail_all(self, error: EngineError) -> int:
        """End all streams with an error; returns how many there were."""
        flights = list(self._flights.values())
        for flight in flights:
            self._forget(flight)
            flight.stream.fail(error)
        return len(flights)

    def _forget(self, flight: _Flight) -> None:
        request_id = flight.request.request_id
        del self._flights[request_id]
        self._waiting.pop(request_id, None)
        if flight is self._on_trial:
            self._on_trial = None
