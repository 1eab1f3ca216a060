"""What an answer can consist of, as it grows: messages, reasoning, calls. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from server.events import (
    ContentPartAdded,
    ContentPartDone,
    Event,
    FunctionCallArgumentsDelta,
    FunctionCallArgumentsDone,
    OutputItemAdded,
    OutputTextDelta,
    OutputTextDone,
    ReasoningTextDelta,
    ReasoningTextDone,
    TokenLogprob,
)
from server.response_object import (
    derived_id,
    function_call_item,
    message_item,
    output_text,
    reasoning_item,
)

__all__ = ["CallItem", "Chunk", "GrowingItem", "MessageItem", "ReasoningItem"]


class Chunk(NamedTuple):
    """Decoded text with the tokens that it came from; ids and log-probabilities where wanted."""

    text: str
    num_tokens: int = 0
    token_ids: list[int] | None = None
    logprobs: Sequence[TokenLogprob] = ()


class GrowingItem(Protocol):
    """One output item."""

    output_index: int

    def begin(self) -> list[Event]:
        """Return the events that open it."""

    def add(self, chunk: Chunk) -> Event:
        """Take more text; return the event that says so."""

    def settle(self) -> list[Event]:
        """Return its own last events."""

    def body(self, status: str) -> dict[str, Any]:
        """Return it as it stands."""


class MessageItem:
    """Text for the user."""

    def __init__(self, turn_id: str, output_index: int) -> None:
        self.output_index = output_index
        self._id = derived_id("msg", turn_id, output_index)
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def begin(self) -> list[Event]:
        """Return the events that open it."""
        item = message_item(self._id, "in_progress", [])
        return [
            OutputItemAdded(output_index=self.output_index, item=item),
            ContentPartAdded(
                item_id=self._id,
                output_index=self.output_index,
                content_index=0,
                part=output_text(""),
            ),
        ]

    def add(self, chunk: Chunk) -> Event:
        """Take more text; return the event that says so."""
        self._texts.append(chunk.text)
        self._logprobs += chunk.logprobs
        return OutputTextDelta(
            item_id=self._id,
            output_index=self.output_index,
            content_index=0,
            delta=chunk.text,
            logprobs=list(chunk.logprobs),
            token_ids=chunk.token_ids,
        )

    def settle(self) -> list[Event]:
        """Return its own last events."""
        part = self._part()
        return [
            OutputTextDone(
                item_id=self._id,
                output_index=self.output_index,
                content_index=0,
                text=part["text"],
                logprobs=self._logprobs,
            ),
            ContentPartDone(
                item_id=self._id, output_index=self.output_index, content_index=0, part=part
            ),
        ]

    def body(self, status: str) -> dict[str, Any]:
        """Return it as it stands."""
        return message_item(self._id, status, [self._part()])

    def _part(self) -> dict[str, Any]:
        return output_text("".join(self._texts), self._logprobs)


class ReasoningItem:
    """What the model thought before it answered. It has no place for log-probabilities."""

    def __init__(self, turn_id: str, output_index: int) -> None:
        self.output_index = output_index
        self._id = derived_id("rs", turn_id, output_index)
        self._texts: list[str] = []

    def begin(self) -> list[Event]:
        """Return the events that open it."""
        item = reasoning_item(self._id, "in_progress", [])
        return [
            OutputItemAdded(output_index=self.output_index, item=item),
            ContentPartAdded(
                item_id=self._id,
                output_index=self.output_index,
                content_index=0,
                part={"type": "reasoning_text", "text": ""},
            ),
        ]

    def add(self, chunk: Chunk) -> Event:
        """Take more text; return the event that says so."""
        self._texts.append(chunk.text)
        return ReasoningTextDelta(
            item_id=self._id,
            output_index=self.output_index,
            content_index=0,
            delta=chunk.text,
            token_ids=chunk.token_ids,
        )

    def settle(self) -> list[Event]:
        """Return its own last events."""
        part = self._part()
        return [
            ReasoningTextDone(
                item_id=self._id,
                output_index=self.output_index,
                content_index=0,
                text=part["text"],
            ),
            ContentPartDone(
                item_id=self._id, output_index=self.output_index, content_index=0, part=part
            ),
        ]

    def body(self, status: str) -> dict[str, Any]:
        """Return it as it stands."""
        return reasoning_item(self._id, status, [self._part()])

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": "".join(self._texts)}


class CallItem:
    """A call of a function. It has no place for log-probabilities."""

    def __init__(self, turn_id: str, output_index: int, name: str) -> None:
        self.output_index = output_index
        self.complete = False
        """Whether its arguments are closed."""
        self._id = derived_id("fc", turn_id, output_index)
        self._call_id = derived_id("call", turn_id, output_index)
        self._name = name
        self._texts: list[str] = []

    def begin(self) -> list[Event]:
        """Return the events that open it."""
        item = function_call_item(self._id, "in_progress", self._call_id, self._name, "")
        return [OutputItemAdded(output_index=self.output_index, item=item)]

    def add(self, chunk: Chunk) -> Event:
        """Take more text; return the event that says so."""
        self._texts.append(chunk.text)
        return FunctionCallArgumentsDelta(
            item_id=self._id,
            output_index=self.output_index,
            delta=chunk.text,
            token_ids=chunk.token_ids,
        )

    def settle(self) -> list[Event]:
        """Return its own last events."""
        return [
            FunctionCallArgumentsDone(
                item_id=self._id,
                output_index=self.output_index,
                name=self._name,
                arguments="".join(self._texts),
            )
        ]

    def body(self, status: str) -> dict[str, Any]:
        """Return it as it stands."""
        # Whatever cut the answer afterwards, a call whose arguments are closed is whole.
        status = "completed" if self.complete else "incomplete"
        return function_call_item(self._id, status, self._call_id, self._name, "".join(self._texts))
