"""The output items of one answer as they grow: parsed text in, events out. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from server.events import (
    ContentPartAdded,
    ContentPartDone,
    Event,
    FunctionCallArgumentsDelta,
    FunctionCallArgumentsDone,
    OutputItemAdded,
    OutputItemDone,
    OutputTextDelta,
    OutputTextDone,
    ReasoningTextDelta,
    ReasoningTextDone,
    TokenLogprob,
)
from server.parsing.qwen import (
    CallArguments,
    CallBegin,
    CallEnd,
    Content,
    Piece,
    QwenParser,
    Reasoning,
)
from server.response_object import (
    function_call_item,
    message_item,
    new_id,
    output_text,
    reasoning_item,
)

__all__ = ["Chunk", "OutputItems"]


class Chunk(NamedTuple):
    """Decoded text with the tokens that it came from; ids and log-probabilities where wanted."""

    text: str
    num_tokens: int = 0
    token_ids: list[int] | None = None
    logprobs: Sequence[TokenLogprob] = ()


class _Item(Protocol):
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


class _Message:
    """Text for the user."""

    def __init__(self, output_index: int) -> None:
        self.output_index = output_index
        self._id = new_id("msg")
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    def begin(self) -> list[Event]:
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
        return message_item(self._id, status, [self._part()])

    def _part(self) -> dict[str, Any]:
        return output_text("".join(self._texts), self._logprobs)


class _Reasoning:
    """What the model thought before it answered. It has no place for log-probabilities."""

    def __init__(self, output_index: int) -> None:
        self.output_index = output_index
        self._id = new_id("rs")
        self._texts: list[str] = []

    def begin(self) -> list[Event]:
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
        self._texts.append(chunk.text)
        return ReasoningTextDelta(
            item_id=self._id,
            output_index=self.output_index,
            content_index=0,
            delta=chunk.text,
            token_ids=chunk.token_ids,
        )

    def settle(self) -> list[Event]:
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
        return reasoning_item(self._id, status, [self._part()])

    def _part(self) -> dict[str, Any]:
        return {"type": "reasoning_text", "text": "".join(self._texts)}


class _Call:
    """A call of a function. It has no place for log-probabilities."""

    def __init__(self, output_index: int, name: str) -> None:
        self.output_index = output_index
        self.complete = False
        """Whether its arguments are closed."""
        self._id = new_id("fc")
        self._call_id = new_id("call")
        self._name = name
        self._texts: list[str] = []

    def begin(self) -> list[Event]:
        item = function_call_item(self._id, "in_progress", self._call_id, self._name, "")
        return [OutputItemAdded(output_index=self.output_index, item=item)]

    def add(self, chunk: Chunk) -> Event:
        self._texts.append(chunk.text)
        return FunctionCallArgumentsDelta(
            item_id=self._id,
            output_index=self.output_index,
            delta=chunk.text,
            token_ids=chunk.token_ids,
        )

    def settle(self) -> list[Event]:
        return [
            FunctionCallArgumentsDone(
                item_id=self._id,
                output_index=self.output_index,
                name=self._name,
                arguments="".join(self._texts),
            )
        ]

    def body(self, status: str) -> dict[str, Any]:
        # Whatever cut the answer afterwards, a call whose arguments are closed is whole.
        status = "completed" if self.complete else "incomplete"
        return function_call_item(self._id, status, self._call_id, self._name, "".join(self._texts))


class OutputItems:
    """All items of one choice.

    Args:
        first_index: ``output_index`` of the first; each next one has ``stride`` more.
        parser: parts the text; None: all of it is one message.
        one_call: nothing follows the first call.
    """

    def __init__(
        self, first_index: int, stride: int, parser: QwenParser | None, *, one_call: bool = False
    ) -> None:
        self.num_calls = 0
        """Calls whose arguments are closed."""
        self.num_reasoning_tokens = 0
        self._one_call = one_call
        self._next_index = first_index
        self._stride = stride
        self._parser = parser
        self._open: _Item | None = None
        self._done: list[tuple[int, dict[str, Any]]] = []
        self._waiting = Chunk("")
        """Tokens whose text is held back, or was no text of an item."""

    @property
    def begun(self) -> bool:
        """Whether there is an item."""
        return self._open is not None or bool(self._done)

    @property
    def full(self) -> bool:
        """Whether no more text is wanted."""
        return self._one_call and self.num_calls > 0

    @property
    def by_token(self) -> bool:
        """Whether tokens must come one a chunk, for those of the reasoning are counted."""
        return self._parser is not None and (self._parser.reasoning or not self._parser.begun)

    def prime(self, opening: str) -> None:
        """Take what the prompt has begun the answer with: a call, before its arguments."""
        if self._parser is not None and opening:
            pieces = self._parser.push(opening)
            assert not pieces, "no more than a call's name can be given"

    def write(self, chunks: Iterable[Chunk]) -> list[Event]:
        """Take decoded text; return the events, with adjacent text of one item in one of them."""
        events: list[Event] = []
        run = _Run(events)
        for chunk in chunks:
            if self.full:
                break
            self._waiting = _joined(self._waiting, chunk._replace(text=""))
            pieces = self._pieces(chunk.text)
            for piece in pieces:
                self._take(piece, run)
            held = self._parser is not None and self._parser.holding
            if self._parser is not None and self._parser.reasoning:
                self.num_reasoning_tokens += chunk.num_tokens
            if not pieces and not held and self._open is not None:
                # Part of a character, or a token without text: it belongs to what is open.
                run.add(self._open, self._claim(""))
        run.flush()
        return events

    def finish(self) -> list[Event]:
        """End the text: write what is held back, and begin a message if there is no item."""
        events: list[Event] = []
        if self._parser is not None and not self.full:
            run = _Run(events)
            for piece in self._parser.finish():
                self._take(piece, run)
            run.flush()
        if not self.begun:
            events += self._begin(_Message(self._take_index()))
        if self._open is not None and (self._waiting.token_ids or self._waiting.logprobs):
            events.append(self._open.add(self._claim("")))
        return events

    def close(
        self, status: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> list[Event]:
        """End the last item."""
        if self._open is None:
            return []
        return self._end(status, finish_reason, stop_reason)

    def bodies(self) -> list[tuple[int, dict[str, Any]]]:
        """Return the final items with their ``output_index``."""
        return self._done

    @property
    def next_index(self) -> int:
        """The ``output_index`` that the next item would get."""
        return self._next_index

    def _pieces(self, text: str) -> list[Piece]:
        if not text:
            return []
        return [Content(text)] if self._parser is None else self._parser.push(text)

    def _take(self, piece: Piece, run: _Run) -> None:
        if self.full:
            return
        match piece:
            case Content(text):
                run.add(self._opened(_Message, run), self._claim(text))
            case Reasoning(text):
                run.add(self._opened(_Reasoning, run), self._claim(text))
            case CallBegin(name):
                run.flush()
                run.events += self._begin(_Call(self._take_index(), name))
            case CallArguments(text):
                assert self._open is not None
                run.add(self._open, self._claim(text))
            case CallEnd(complete):
                assert isinstance(self._open, _Call)
                self._open.complete = complete
                self.num_calls += complete

    def _opened(self, kind: type[_Message | _Reasoning], run: _Run) -> _Item:
        if not isinstance(self._open, kind):
            run.flush()
            run.events += self._begin(kind(self._take_index()))
        assert self._open is not None
        return self._open

    def _begin(self, item: _Item) -> list[Event]:
        events = [] if self._open is None else self._end("completed", None, None)
        self._open = item
        return events + item.begin()

    def _end(
        self, status: str, finish_reason: str | None, stop_reason: str | int | None
    ) -> list[Event]:
        item, self._open = self._open, None
        assert item is not None
        body = item.body(status)
        self._done.append((item.output_index, body))
        done = OutputItemDone(
            output_index=item.output_index,
            item=body,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )
        return [*item.settle(), done]

    def _take_index(self) -> int:
        index = self._next_index
        self._next_index += self._stride
        return index

    def _claim(self, text: str) -> Chunk:
        chunk, self._waiting = self._waiting._replace(text=text), Chunk("")
        return chunk


class _Run:
    """Adjacent text of one item on its way into one event."""

    def __init__(self, events: list[Event]) -> None:
        self.events = events
        self._item: _Item | None = None
        self._chunk = Chunk("")

    def add(self, item: _Item, chunk: Chunk) -> None:
        if item is not self._item:
            self.flush()
            self._item, self._chunk = item, chunk
        else:
            self._chunk = _joined(self._chunk, chunk)

    def flush(self) -> None:
        chunk = self._chunk
        if self._item is not None and (chunk.text or chunk.token_ids or chunk.logprobs):
            self.events.append(self._item.add(self._chunk))
        self._item = None


def _joined(one: Chunk, other: Chunk) -> Chunk:
    ids = one.token_ids
    if other.token_ids is not None:
        ids = [*(ids or ()), *other.token_ids]
    return Chunk(
        one.text + other.text,
        one.num_tokens + other.num_tokens,
        ids,
        [*one.logprobs, *other.logprobs],
    )
