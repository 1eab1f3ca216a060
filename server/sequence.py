"""A turn's sequences: what is asked of the engine, and the choice that its answer becomes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from typing import Protocol

from engine import (
    Delta,
    EngineError,
    EngineState,
    EngineStats,
    ModelInfo,
    Request,
    RequestStream,
    Tokenizer,
)
from server.choice import Choice, Phase
from server.prompting import resolve_sampling
from server.request import TurnRequest

__all__ = ["Engine", "EngineSequence", "make_sequences"]


class Engine(Protocol):
    """What turns need of an EngineClient."""

    @property
    def state(self) -> EngineState:
        """Whether requests can be served now."""

    @property
    def info(self) -> ModelInfo:
        """The loaded model."""

    @property
    def stats(self) -> EngineStats:
        """The engine's latest figures."""

    @property
    def last_progress_s(self) -> float:
        """``time.monotonic()`` of the engine's latest sign of life."""

    def generate(self, request: Request) -> RequestStream:
        """Submit a request and return its deltas."""

    def abort(self, request_id: str) -> None:
        """Ask for a request's end; its stream then ends with FinishReason.ABORT."""

    async def close(self) -> None:
        """End the engine."""


class EngineSequence:
    """One choice with its engine request."""

    def __init__(self, choice: Choice, prompt_ids: list[int], request: Request) -> None:
        self.choice = choice
        self.prompt_ids = prompt_ids
        self.request = request
        self._stream: RequestStream | None = None

    def submit(self, engine: Engine) -> None:
        """Hand the request to the engine. Raises EngineError."""
        self._stream = engine.generate(self.request)

    async def leave(self) -> None:
        """Abort what the engine still does."""
        if self._stream is not None:
            await self._stream.aclose()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield what the engine sends; how it ends no longer matters once the choice is closed."""
        assert self._stream is not None
        try:
            async for delta in self._stream:
                yield delta
        except EngineError:
            if self.choice.phase is not Phase.CLOSED:
                raise


def make_sequences(
    turn_id: str,
    request: TurnRequest,
    prompts: Iterable[list[int]],
    *,
    tokenizer: Tokenizer,
    info: ModelInfo,
    seed: int,
) -> list[EngineSequence]:
    """Return the sequences of a turn, nothing submitted yet: all choices of each prompt in turn."""
    eos_ids = frozenset(info.eos_token_ids)
    sequences: list[EngineSequence] = []
    for prompt_ids in prompts:
        for index in range(request.n):
            number = len(sequences)
            # Equal prompts of one request get other answers, unless a seed is asked for.
            offset = number if request.sampling.seed is None else index
            engine_request = Request(
                request_id=f"{turn_id}.{number}",
                prompt_ids=prompt_ids,
                sampling=resolve_sampling(
                    request, info, len(prompt_ids), seed + offset, first_choice=index == 0
                ),
                priority=request.priority,
                cache_salt=request.owner,
            )
            choice = Choice(request, tokenizer, number, eos_ids)
            sequences.append(EngineSequence(choice, prompt_ids, engine_request))
    return sequences
