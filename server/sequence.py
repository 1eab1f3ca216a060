"""A turn's sequences: what is asked of the engine, and the choice that its answer becomes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec

from engine import (
    Delta,
    EngineError,
    EngineState,
    EngineStats,
    ModelInfo,
    Recoveries,
    Request,
    RequestStream,
    Tokenizer,
)
from server.choice import Choice, Phase
from server.output_items import OutputItems
from server.parsing.qwen import QwenParser
from server.prompting import resolve_sampling
from server.request import TurnRequest

__all__ = ["Engine", "EngineSequence", "SequenceMaker"]


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
    def recoveries(self) -> Recoveries:
        """What became of engines that died."""

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
        self.known_ids: list[int] = []
        """Tokens that were generated elsewhere, before the turn was taken over."""
        self._stream: RequestStream | None = None

    def submit(self, engine: Engine) -> None:
        """Hand the request to the engine. Raises EngineError."""
        self._stream = engine.generate(self.request)

    def go_on(self, engine: Engine) -> None:
        """Hand it in with what was generated elsewhere, unless it has ended. Raises EngineError."""
        if self.choice.phase is not Phase.CLOSED:
            self.request = msgspec.structs.replace(self.request, output_ids=self.known_ids)
            self.submit(engine)

    async def leave(self) -> None:
        """Abort what the engine still does. Idempotent."""
        if self._stream is not None:
            await self._stream.aclose()

    async def deltas(self) -> AsyncIterator[Delta]:
        """Yield what the engine sends; how it ends no longer matters once the choice is closed."""
        if self._stream is None:
            return  # Taken over after its end.
        try:
            async for delta in self._stream:
                yield delta
        except EngineError:
            if self.choice.phase is not Phase.CLOSED:
                raise


class SequenceMaker:
    """Makes the sequences of one turn; nothing is submitted yet.

    Args:
        seed: of the turn's first choice.
        arrived_s: when the turn arrived, ``time.monotonic()``.
    """

    def __init__(
        self, turn_id: str, tokenizer: Tokenizer, info: ModelInfo, seed: int, arrived_s: float
    ) -> None:
        self._turn_id = turn_id
        self._tokenizer = tokenizer
        self._info = info
        self._seed = seed
        self._arrived_s = arrived_s
        self._eos_ids = frozenset(info.eos_token_ids)

    def all(self, request: TurnRequest, prompts: Sequence[list[int]]) -> list[EngineSequence]:
        """Return the sequences that a turn begins with: all choices of each prompt in turn."""
        sequences: list[EngineSequence] = []
        num_choices = request.n * len(prompts)
        for prompt_ids in prompts:
            for index in range(request.n):
                number = len(sequences)
                # Equal prompts of one request get other answers, unless a seed is asked for.
                offset = number if request.sampling.seed is None else index
                items = self._items(request, prompt_ids, number, num_choices)
                sequences.append(self._make(request, prompt_ids, number, offset, items))
        return sequences

    def next(
        self, request: TurnRequest, prompt_ids: list[int], number: int, first_index: int
    ) -> EngineSequence:
        """Return one that goes on with a turn of one choice, as its sequence ``number``.

        Its items begin at ``output_index`` ``first_index``.
        """
        items = self._items(request, prompt_ids, first_index, 1)
        return self._make(request, prompt_ids, number, 0, items)

    def _items(
        self, request: TurnRequest, prompt_ids: list[int], first_index: int, stride: int
    ) -> OutputItems:
        parser = None
        if request.messages is not None:
            end = self._tokenizer.decode(prompt_ids[-16:], skip_special=False).rstrip()
            parser = QwenParser(tools=request.tools.active, reasoning=end.endswith("<think>"))
        items = OutputItems(
            self._turn_id,
            first_index,
            stride,
            parser,
            one_call=request.tools.active and not request.tools.parallel,
        )
        items.prime(request.tools.opening)
        return items

    def _make(
        self,
        request: TurnRequest,
        prompt_ids: list[int],
        number: int,
        seed_offset: int,
        items: OutputItems,
    ) -> EngineSequence:
        engine_request = Request(
            request_id=f"{self._turn_id}.{number}",
            prompt_ids=prompt_ids,
            sampling=resolve_sampling(
                request,
                self._info,
                len(prompt_ids),
                self._seed + seed_offset,
                first_choice=number % request.n == 0,
            ),
            priority=request.priority,
            due_s=request.due_s(self._arrived_s),
            cache_salt=request.owner,
            tenant=request.owner,
            weight=request.weight,
        )
        choice = Choice(request, self._tokenizer, number, items, self._eos_ids)
        return EngineSequence(choice, prompt_ids, engine_request)
