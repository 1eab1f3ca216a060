"""What the answers of Completions show of their prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from server.dialects.legacy_logprobs import LegacyLogprobs
from server.dialects.projection import Shape
from server.events import ResponsePrompt
from server.request import TurnRequest

__all__ = ["Decode", "Prompts"]

Decode = Callable[[Sequence[int]], str]
"""Token ids to text; echo of a prompt that came as ids needs it."""


class Prompts:
    """What is known of a turn's prompts; ``index`` is that of a choice."""

    def __init__(self, turn: TurnRequest, shape: Shape, decode: Decode) -> None:
        self._turn = turn
        self._decode = decode
        self._shows_ids = shape.token_ids
        self._events: dict[int, ResponsePrompt] = {}

    def add(self, event: ResponsePrompt) -> None:
        """Take in what the turn says of a prompt."""
        self._events[event.output_index // self._turn.n] = event

    def num_tokens(self) -> int:
        """Return how many tokens all prompts have that were told of."""
        return sum(len(event.token_ids) for event in self._events.values())

    def echo(self, index: int) -> str:
        """Return the prompt as text, "" where none is to be shown."""
        if not self._turn.echo:
            return ""
        assert self._turn.prompts is not None
        prompt = self._turn.prompts[index // self._turn.n]
        return prompt if isinstance(prompt, str) else self._decode(prompt)

    def legacy(self, index: int, logprobs: LegacyLogprobs) -> dict[str, list[Any]]:
        """Return the arrays of the prompt that echo shows, empty where it shows none."""
        event = self._events.get(index // self._turn.n)
        if not self._turn.echo or event is None or event.logprobs is None:
            return logprobs.add([])
        return logprobs.add(event.logprobs, self._decode(event.token_ids[:1]))

    def shown(self, index: int) -> dict[str, Any]:
        """Return the fields of a choice that say how its prompt was read."""
        event = self._events.get(index // self._turn.n)
        if event is None:
            return {}
        extra: dict[str, Any] = {}
        if self._shows_ids:
            extra["prompt_token_ids"] = event.token_ids
        if event.logprobs is not None and not self._turn.echo:
            extra["prompt_logprobs"] = event.logprobs
        return extra
